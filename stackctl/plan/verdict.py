"""Whether a plan fits and is worth running, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.plan.roofline import Work
from stackctl.quantity import format_bytes
from stackctl.values.model import Model
from stackctl.values.plan import MemoryBudget, Plan, Prediction, Verdict
from stackctl.values.profile import Profile

#: The part of a 16-bit cache that q8_0 (and more so fp8) saves.
_LESS_KV = 15 / 32


def judge(
    profile: Profile,
    model: Model,
    work: Work,
    budgets: Sequence[tuple[MemoryBudget, str]],
    prediction: Prediction,
    shared: str = "",
) -> Verdict:
    """The verdict: memory first, then speed against what the profile calls fast enough.

    ``shared`` says with whom cores are shared, which is told and refuses nothing.

    A plan is not viable when even the optimistic end of a prediction misses its objective; when
    only the cautious end does, it is viable and the reason says so.
    """
    reasons: list[str] = []
    alternatives: list[str] = []
    fits: bool | None = True
    for budget, why in budgets:
        if budget.limit_bytes is None or budget.headroom_bytes is None:
            fits = None if fits else fits
            reasons.append(why)
            continue
        reasons.append(_need(budget, why))
        if budget.headroom_bytes < 0:
            fits = False
            reasons.append(f"{format_bytes(-budget.headroom_bytes)} too much")
            alternatives += _smaller(profile, model, budget)
    speed, missed, viable = _speed(profile, model, work, prediction)
    reasons += missed
    if not speed and not missed:
        reasons.append("speed not predicted: " + _why_unknown(prediction))
    if shared:
        reasons.append(f"cores {shared}")
    if fits is False:
        viable = False
    return Verdict(
        viable=viable if speed or fits is False else None,
        fits=fits,
        reasons=tuple(reasons),
        alternatives=tuple(alternatives),
    )


def _need(budget: MemoryBudget, why: str) -> str:
    return (
        f"{budget.pool}: weights {format_bytes(budget.weights_bytes)} + KV "
        f"{format_bytes(budget.kv_bytes)} + engine {format_bytes(budget.compute_bytes)} = "
        f"{format_bytes(budget.total_bytes)} of {format_bytes(budget.limit_bytes or 0)} ({why})"
    )


def _smaller(profile: Profile, model: Model, budget: MemoryBudget) -> list[str]:
    """The nearest changes that fit, smallest loss first."""
    over = -(budget.headroom_bytes or 0)
    found = []
    if budget.kv_bytes > over:
        context = profile.context if isinstance(profile.context, int) else model.context
        if context:
            share = (budget.kv_bytes - over) / budget.kv_bytes
            fitting = int(context * share) // 256 * 256
            if fitting >= 512:
                found.append(f"a smaller context: --set context={fitting}")
        if budget.kv_bytes * _LESS_KV > over and profile.kv_type in (None, "f16", "auto"):
            kind = "fp8" if profile.engine == "vllm" else "q8_0"
            found.append(f"a smaller KV cache: --set kv_type={kind}")
    if isinstance(profile.concurrency, int) and profile.engine == "llama.cpp":
        fewer = int(profile.concurrency * (1 - over / max(1, budget.kv_bytes)))
        if fewer >= 1:
            found.append(f"fewer requests at once: --set concurrency={fewer}")
    if model.experts and budget.pool != "memory" and profile.placement.cpu_experts is None:
        found.append("experts in main memory: --set placement.cpu_experts=auto")
    fraction = 1 - over / max(1, budget.weights_bytes)
    if fraction > 0.2:
        found.append(
            f"weights of {format_bytes(budget.weights_bytes - over)} at most: "
            "a stronger quantisation, or a smaller model"
        )
    else:
        found.append("a smaller model: --model SOURCE")
    return found


def _speed(
    profile: Profile, model: Model, work: Work, prediction: Prediction
) -> tuple[bool, list[str], bool | None]:
    """Whether anything could be judged, what misses (and what is at risk), and the verdict."""
    slo, reasons, viable, judged = profile.slo, [], True, False
    ttft = prediction.ttft_s.range if prediction.ttft_s else None
    if slo.ttft_s is not None and ttft is not None and prediction.ttft_s is not None:
        judged = True
        at = f"at {prediction.ttft_s.prompt_tokens:,} tokens"
        if ttft[0] > slo.ttft_s:
            viable = False
            reasons.append(f"first token after {seconds(ttft)} s {at}, allowed {slo.ttft_s:g} s")
        elif ttft[1] > slo.ttft_s:
            reasons.append(
                f"first token after {seconds(ttft)} s {at}: may miss the {slo.ttft_s:g} s allowed"
            )
    decode = prediction.decode_tok_s
    if decode is not None and (slo.min_tok_s is not None or slo.itl_ms is not None):
        judged = True
        least = max(slo.min_tok_s or 0, 1000 / slo.itl_ms if slo.itl_ms else 0)
        if decode[1] < least:
            viable = False
            reasons.append(f"generates {numbers(decode)} tok/s, wanted {least:g}")
        elif decode[0] < least:
            reasons.append(f"generates {numbers(decode)} tok/s: may miss the {least:g} wanted")
    if not viable:
        reasons += _why_slow(model, work)
    if decode is not None or ttft is not None:
        judged = True
    return judged, reasons, viable if judged else None


def _why_slow(model: Model, work: Work) -> list[str]:
    size = f"{(work.cpu_bytes + work.gpu_bytes) * model.passes / 1e9:.3g} GB"
    active = (model.active_parameters or model.parameters) / 1e9
    if model.passes > 1:
        return [f"looped {active:.3g}B: its layers run {model.passes} times for every token"]
    if model.experts:
        return [f"every token reads {size} of active experts and computes {active:.3g}B parameters"]
    return [f"dense {active:.3g}B: every token reads all {size} and computes all its parameters"]


def _why_unknown(prediction: Prediction) -> str:
    return "memory bandwidth unknown" if prediction.decode_tok_s is None else "no objective"


def advise(plan: Plan, profile: Profile, candidates: Sequence[Plan]) -> Verdict:
    """The verdict with what helps, best first: other profiles on a GPU, shorter prompts, smaller
    models on the CPU, batch work.

    ``candidates`` are plans of other profiles for the same machine; only those that fit and are
    viable are offered.
    """
    verdict = plan.verdict
    if verdict.fits is not False and verdict.viable is not False:
        return verdict
    mine = (plan.profile, plan.model.source)
    good = [
        c
        for c in candidates
        if c.verdict.fits and c.verdict.viable and (c.profile, c.model.source) != mine
    ]
    on_gpu = sorted((c for c in good if c.placement.gpus), key=_wait)
    on_cpu = [c for c in good if not c.placement.gpus]
    interactive = [c for c in on_cpu if c.prediction.ttft_s and c.objective == "latency"]
    batch = [c for c in on_cpu if c not in interactive]
    found = [*verdict.alternatives]
    # What keeps the first-token objective comes before advice to send less, what does not after.
    allowed = profile.slo.ttft_s or float("inf")
    prompt = [c for c in on_gpu if _wait(c)[0] <= allowed]
    found += [_offer(c) for c in prompt]
    if shorter := _shorter(plan, profile):
        found.append(shorter)
    found += [_offer(c) for c in on_gpu if c not in prompt]
    found += [_offer(c) for c in interactive]
    found += [_offer(c) for c in batch]
    return Verdict(
        viable=verdict.viable,
        fits=verdict.fits,
        reasons=verdict.reasons,
        alternatives=tuple(dict.fromkeys(found)),
    )


def headline(plan: Plan) -> str:
    """What is wrong with a plan that was refused, in one line."""
    if plan.verdict.fits is not False:
        return f"{plan.profile} is not viable"
    budgets = [plan.memory] + ([plan.host_memory] if plan.host_memory else [])
    short = -min(budget.headroom_bytes or 0 for budget in budgets)
    return f"{plan.profile} does not fit: {format_bytes(short)} too much"


def _wait(plan: Plan) -> tuple[int, float]:
    """Whole seconds to the first token, then the faster one."""
    ttft, decode = plan.prediction.ttft_s, plan.prediction.decode_tok_s
    seconds = ttft.range[1] if ttft is not None and ttft.range is not None else 1e9
    return round(seconds), -(decode[0] if decode else 0.0)


def _offer(plan: Plan) -> str:
    parts: list[str] = []
    if decode := plan.prediction.decode_tok_s:
        parts.append(f"{numbers(decode)} tok/s")
    ttft = plan.prediction.ttft_s
    if ttft and ttft.range and plan.objective == "latency":
        parts.append(f"first token {seconds(ttft.range)} s")
    parts.append(plan.served_name)
    return f"stackctl up {plan.profile}: " + ", ".join(parts)


def _shorter(plan: Plan, profile: Profile) -> str | None:
    """How long a prompt may be for the first token to come in time, on the cautious side."""
    prefill, allowed = plan.prediction.prefill_tok_s, profile.slo.ttft_s
    if prefill is None or allowed is None or plan.verdict.fits is False:
        return None
    tokens = int(prefill[0] * allowed) // 10 * 10
    return f"shorter prompts: under {allowed:g} s up to about {tokens:,} tokens" if tokens else None


def numbers(pair: tuple[float, float]) -> str:
    """A range for people: ``25-38``."""
    return f"{_short(pair[0])}-{_short(pair[1])}"


def seconds(pair: tuple[float, float]) -> str:
    """A range of seconds for people."""
    return f"{_short(pair[0])}-{_short(pair[1])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
