"""Whether a plan fits and is worth running, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from stackctl.plan.roofline import Work
from stackctl.quantity import format_bytes
from stackctl.values.model import Model
from stackctl.values.plan import MemoryBudget, Plan, Prediction, Verdict
from stackctl.values.profile import Profile, Slo

#: Waiting so many times longer than on the fastest GPU profile is no remedy for waiting.
_MUCH_SLOWER = 2


def judge(
    profile: Profile,
    model: Model,
    work: Work,
    budgets: Sequence[tuple[MemoryBudget, str]],
    prediction: Prediction,
    notes: Sequence[str] = (),
) -> Verdict:
    """The verdict: memory first, then speed against what the profile calls fast enough.

    ``notes`` are told besides and refuse nothing: what is shared with other stacks.

    A plan is not viable when even the optimistic end of a prediction misses its objective; when
    only the cautious end does, it is viable and the reason says so.
    """
    reasons: list[str] = []
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
    speed, missed, viable = _speed(profile, model, work, prediction)
    reasons += missed
    if not speed and not missed:
        reasons.append("speed not predicted: " + _why_unknown(prediction))
    reasons += notes
    if fits is False:
        viable = False
    return Verdict(
        viable=viable if speed or fits is False else None,
        fits=fits,
        reasons=tuple(reasons),
    )


def _need(budget: MemoryBudget, why: str) -> str:
    named = (
        ("weights", budget.weights_bytes),
        ("KV", budget.kv_bytes),
        ("engine", budget.compute_bytes - budget.cache_bytes),
        ("cache", budget.cache_bytes),
    )
    parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in named if size)
    return (
        f"{budget.pool}: {parts} = {format_bytes(budget.total_bytes)} of "
        f"{format_bytes(budget.limit_bytes or 0)} ({why}"
        f"{'; measured' if budget.basis == 'measured' else ''})"
    )


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
        if decode is not None and not any("tok/s" in text for text in reasons):
            reasons.append(f"generation would be {numbers(decode)} tok/s")
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


def objectives(slo: Slo, prediction: Prediction) -> list[tuple[str, str]]:
    """Each objective in words, and how the prediction stands to it: ok (all of its range), at risk
    (a part), missed (none) or unknown."""
    found = []
    if slo.ttft_s is not None:
        waits = prediction.ttft_s.range if prediction.ttft_s else None
        found.append((f"p95 first token {slo.ttft_s:g} s", _stands(waits, slo.ttft_s)))
    decode = prediction.decode_tok_s
    if slo.itl_ms is not None:
        gaps = None if decode is None else (1000 / decode[1], 1000 / decode[0])
        found.append((f"p95 between tokens {slo.itl_ms:g} ms", _stands(gaps, slo.itl_ms)))
    if slo.min_tok_s is not None:
        slow = None if decode is None else (1 / decode[1], 1 / decode[0])
        found.append((f"at least {slo.min_tok_s:g} tok/s", _stands(slow, 1 / slo.min_tok_s)))
    return found


def _stands(seconds: tuple[float, float] | None, allowed: float) -> str:
    if seconds is None:
        return "unknown"
    return "ok" if seconds[1] <= allowed else "at risk" if seconds[0] <= allowed else "missed"


def advise(
    plan: Plan, profile: Profile, candidates: Sequence[Plan], moved: Sequence[str] = ()
) -> Verdict:
    """The verdict with what helps, best first: other profiles on a GPU, shorter prompts, smaller
    models on the CPU, slower models on a GPU, batch work.

    ``candidates`` are plans of other profiles for the same machine; only those that fit and are
    viable are offered. ``moved`` names the profiles that were planned with this plan's model
    instead of their own.
    """
    verdict = plan.verdict
    if verdict.fits is not False and verdict.viable is not False:
        return verdict
    good = [c for c in candidates if good_enough(c) and c.stack != plan.stack]
    on_gpu = sorted((c for c in good if c.placement.gpus), key=_wait)
    on_cpu = [c for c in good if not c.placement.gpus]
    interactive = [c for c in on_cpu if c.prediction.ttft_s and c.objective == "latency"]
    batch = [c for c in on_cpu if c not in interactive]
    fast = [c for c in on_gpu if _wait(c)[0] <= _MUCH_SLOWER * _wait(on_gpu[0])[0]]
    ordered = [*map(_offer_of(moved), fast), _shorter(plan, profile)]
    ordered += map(_offer_of(moved), interactive)
    ordered += map(_offer_of(moved), (c for c in on_gpu if c not in fast))
    ordered += map(_offer_of(moved), batch)
    found = [*verdict.alternatives, *(text for text in ordered if text)]
    return msgspec.structs.replace(verdict, alternatives=tuple(dict.fromkeys(found)))


def good_enough(plan: Plan) -> bool:
    """Whether a plan is known to fit and to be worth running."""
    return plan.verdict.fits is True and plan.verdict.viable is True


def headline(plan: Plan) -> str:
    """What is wrong with a plan that was refused, in one line."""
    if plan.verdict.fits is not False:
        return f"not viable: {told(plan)[0]}"
    budgets = [plan.memory] + ([plan.host_memory] if plan.host_memory else [])
    short = -min(budget.headroom_bytes or 0 for budget in budgets)
    return f"{plan.profile} does not fit: {format_bytes(short)} too much"


def told(plan: Plan) -> list[str]:
    """The reasons of a verdict without the budgets that hold."""
    budgets = [plan.memory] + ([plan.host_memory] if plan.host_memory else [])
    good = [f"{b.pool}: " for b in budgets if (b.headroom_bytes or 0) >= 0]
    return [text for text in plan.verdict.reasons if not text.startswith(tuple(good))]


def besides(plan: Plan) -> list[str]:
    """What is to be said of a refused plan besides its headline."""
    said = headline(plan)
    return [text for text in told(plan) if not said.endswith(f": {text}")]


def _wait(plan: Plan) -> tuple[int, float]:
    """Whole seconds to the first token, then the faster one."""
    ttft, decode = plan.prediction.ttft_s, plan.prediction.decode_tok_s
    seconds = ttft.range[1] if ttft is not None and ttft.range is not None else 1e9
    return round(seconds), -(decode[0] if decode else 0.0)


def _offer_of(moved: Sequence[str]) -> Callable[[Plan], str]:
    return lambda plan: _offer(plan, with_model=plan.profile in moved)


def _offer(plan: Plan, *, with_model: bool) -> str:
    parts: list[str] = []
    if decode := plan.prediction.decode_tok_s:
        parts.append(f"{numbers(decode)} tok/s")
    ttft = plan.prediction.ttft_s
    if ttft and ttft.range and plan.objective == "latency":
        parts.append(f"first token {seconds(ttft.range)} s")
    parts.append(plan.served_name)
    model = f" --model {plan.model.source}" if with_model else ""
    return f"stackctl up {plan.profile}{model}: " + ", ".join(parts)


def _shorter(plan: Plan, profile: Profile) -> str | None:
    """How long a prompt may be for the first token to come in time, on the cautious side."""
    prefill, allowed = plan.prediction.prefill_tok_s, profile.slo.ttft_s
    if prefill is None or allowed is None or plan.verdict.fits is False:
        return None
    tokens = int(prefill[0] * allowed) // 10 * 10
    if not tokens:
        return None
    batches = [d for d in plan.decisions if d.field in ("batch-size", "ubatch-size")]
    set_so = ", ".join(f"{d.field.removesuffix('-size')} {d.value}" for d in batches)
    return f"shorter prompts: under {allowed:g} s up to about {tokens:,} tokens" + (
        f"; {set_so}" if set_so and not plan.placement.gpus else ""
    )


def numbers(pair: tuple[float, float]) -> str:
    """A range for people: ``25-38``."""
    return f"{_short(pair[0])}-{_short(pair[1])}"


def seconds(pair: tuple[float, float]) -> str:
    """A range of seconds for people."""
    return f"{_short(pair[0])}-{_short(pair[1])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def summary(plan: Plan) -> str:
    """A plan in one line."""
    memory = plan.memory
    fits = {True: "fits", False: "does not fit", None: "memory unknown"}[plan.verdict.fits]
    limit = "" if memory.limit_bytes is None else f" of {format_bytes(memory.limit_bytes)}"
    return f"{plan.profile} · {plan.objective} · {fits} ({format_bytes(memory.total_bytes)}{limit})"
