"""The verdict on a plan: memory, speed against the objectives, and alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from stackctl.engines import engine as find_engine
from stackctl.plan.roofline import RooflineInput
from stackctl.quantity import format_bytes
from stackctl.values.plan import MemoryBudget, Plan, Prediction, PromptTime, ReasonCode, Verdict
from stackctl.values.profile import Profile, Slo

#: A GPU profile that waits longer than so many times the fastest one is not offered as fast.
_MUCH_SLOWER = 2


class Reason(NamedTuple):
    """One reason of a verdict: its subject, and its text."""

    code: ReasonCode
    text: str


def make_verdict(
    profile: Profile,
    work: RooflineInput,
    budgets: Sequence[tuple[MemoryBudget, str]],
    prediction: Prediction,
    notes: Iterable[Reason] = (),
    *,
    unknown: str,
) -> Verdict:
    """Return the verdict: memory first, then the speed against the profile's objectives.

    ``notes`` on resources that are shared with other stacks are added to the reasons, without an
    effect on the verdict. ``unknown`` is the reason why no speed is predicted, if none is.

    A plan is not viable if even the fast end of a prediction misses its objective. If only the slow
    end misses it, the plan is viable, with a reason that warns.
    """
    fits, reasons = _memory(budgets)
    viable: bool | None = None
    if prediction.decode_tok_s is None and not (prediction.ttft_s and prediction.ttft_s.range):
        reasons.append(Reason("speed-unknown", f"speed not predicted: {unknown}"))
    else:
        against = _speed(profile.slo, work, prediction)
        viable = not any(reason.code == "model-size" for reason in against)
        reasons += against
    reasons += notes
    return Verdict(
        viable=False if fits is False else viable,
        fits=fits,
        reasons=tuple(reason.text for reason in reasons),
        codes=tuple(reason.code for reason in reasons),
    )


def _memory(budgets: Sequence[tuple[MemoryBudget, str]]) -> tuple[bool | None, list[Reason]]:
    """Return True if all budgets fit (None: a limit is unknown), and the reasons."""
    reasons: list[Reason] = []
    fits: bool | None = True
    for budget, why in budgets:
        if budget.limit_bytes is None or budget.headroom_bytes is None:
            fits = None if fits else fits
            reasons.append(Reason("memory-unknown", why))
        elif budget.headroom_bytes < 0:
            fits = False
            reasons.append(Reason("memory-exceeded", _need(budget, why)))
            shortage = f"{format_bytes(-budget.headroom_bytes)} too much"
            reasons.append(Reason("memory-shortage", shortage))
        else:
            reasons.append(Reason("memory-fits", _need(budget, why)))
    return fits, reasons


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


def _speed(slo: Slo, work: RooflineInput, prediction: Prediction) -> list[Reason]:
    """Return the reasons against the plan; with that of the model's size if it is not viable."""
    decode = prediction.decode_tok_s
    generation = _generation(slo, decode)
    found = (_first_token(slo, prediction.ttft_s), generation)
    reasons = [reason for reason in found if reason is not None]
    if any(reason.code in ("first-token-missed", "generation-missed") for reason in reasons):
        reasons.append(Reason("model-size", _why_slow(work)))
        if decode is not None and generation is None:
            speed = f"generation would be {format_range(decode)} tok/s"
            reasons.append(Reason("generation-speed", speed))
    return reasons


def _first_token(slo: Slo, ttft: PromptTime | None) -> Reason | None:
    """Return the reason if the time to the first token misses its objective or may miss it."""
    if slo.ttft_s is None or ttft is None or ttft.range is None or ttft.range[1] <= slo.ttft_s:
        return None
    waits = f"first token after {format_range(ttft.range)} s at {ttft.prompt_tokens:,} tokens"
    if ttft.range[0] > slo.ttft_s:
        return Reason("first-token-missed", f"{waits}, allowed {slo.ttft_s:g} s")
    return Reason("first-token-at-risk", f"{waits}: may miss the {slo.ttft_s:g} s allowed")


def _generation(slo: Slo, decode: tuple[float, float] | None) -> Reason | None:
    """Return the reason if the speed of generation misses its objectives or may miss them."""
    least = max(slo.min_tok_s or 0, 1000 / slo.itl_ms if slo.itl_ms else 0)
    if decode is None or decode[0] >= least:
        return None
    speed = f"generates {format_range(decode)} tok/s"
    if decode[1] < least:
        return Reason("generation-missed", f"{speed}, wanted {least:g}")
    return Reason("generation-at-risk", f"{speed}: may miss the {least:g} wanted")


def _why_slow(work: RooflineInput) -> str:
    model = work.model
    size = f"{(work.cpu_bytes + work.gpu_bytes) * model.passes / 1e9:.3g} GB"
    active = (model.active_parameters or model.parameters) / 1e9
    if model.passes > 1:
        return f"looped {active:.3g}B: its layers run {model.passes} times for every token"
    if model.experts:
        return f"every token reads {size} of active experts and computes {active:.3g}B parameters"
    return f"dense {active:.3g}B: every token reads all {size} and computes all its parameters"


def objective_status(slo: Slo, prediction: Prediction) -> list[tuple[str, str]]:
    """Return each objective as text, with its rating: ok, at risk, missed or unknown.

    An objective is at risk if only a part of the predicted range meets it.
    """
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


def with_alternatives(
    plan: Plan, profile: Profile, candidates: Sequence[Plan], moved: Sequence[str] = ()
) -> Verdict:
    """Return the verdict with alternatives, best first: other profiles on a GPU, shorter prompts,
    smaller models on the CPU, slower models on a GPU, batch work.

    ``candidates`` are plans of other profiles for the same machine. Only those that fit and are
    viable are offered, and none for interactive use that is slower than a plan that fits.
    ``moved`` names the profiles that were planned with this plan's model instead of their own.
    """
    verdict = plan.verdict
    if not is_refused(plan):
        return verdict
    offered = [c for c in candidates if is_viable(c) and c.stack != plan.stack]
    fast, interactive, rest = _by_use([c for c in offered if not _is_slower(c, plan)])
    shorter = _shorter(plan, profile)
    found = [
        *verdict.alternatives,
        *(_offer(c, with_model=c.profile in moved) for c in fast),
        *((shorter,) if shorter else ()),
        *(_offer(c, with_model=c.profile in moved) for c in (*interactive, *rest)),
    ]
    return msgspec.structs.replace(verdict, alternatives=tuple(dict.fromkeys(found)))


def _by_use(plans: Sequence[Plan]) -> tuple[list[Plan], list[Plan], list[Plan]]:
    """Return the fast plans on GPUs, the interactive plans on the CPU, and the rest."""
    on_gpu = sorted((plan for plan in plans if plan.placement.gpus), key=_wait)
    fast = [plan for plan in on_gpu if _wait(plan)[0] <= _MUCH_SLOWER * _wait(on_gpu[0])[0]]
    on_cpu = [plan for plan in plans if not plan.placement.gpus]
    interactive = [p for p in on_cpu if p.prediction.ttft_s and p.objective == "latency"]
    batch = [plan for plan in on_cpu if plan not in interactive]
    return fast, interactive, [*(plan for plan in on_gpu if plan not in fast), *batch]


def is_viable(plan: Plan) -> bool:
    """Return True if a plan is known to fit and to be worth running."""
    return plan.verdict.fits is True and plan.verdict.viable is True


def is_refused(plan: Plan) -> bool:
    """Return True if a plan is known not to fit or not to be worth running."""
    return plan.verdict.fits is False or plan.verdict.viable is False


def refusal(plan: Plan) -> tuple[str, list[str]]:
    """Return the first reason against a refused plan, in one line, and the other reasons."""
    reasons = _failing(plan)
    if plan.verdict.fits is not False:
        return f"not viable: {reasons[0].text}", [reason.text for reason in reasons[1:]]
    # Each pool that is too small has a shortage, in this order; the largest of them comes first.
    rooms = [budget.headroom_bytes or 0 for budget in (plan.memory, plan.host_memory) if budget]
    short = [room for room in rooms if room < 0]
    shortages = [reason for reason in reasons if reason.code == "memory-shortage"]
    given = shortages[short.index(min(short))]
    headline = f"{plan.profile} does not fit: {format_bytes(-min(short))} too much"
    return headline, [reason.text for reason in reasons if reason is not given]


def failing_reasons(plan: Plan) -> list[str]:
    """Return the reasons of a verdict without the budgets that fit."""
    return [reason.text for reason in _failing(plan)]


def _failing(plan: Plan) -> list[Reason]:
    pairs = zip(plan.verdict.codes, plan.verdict.reasons, strict=True)
    return [Reason(code, text) for code, text in pairs if code != "memory-fits"]


def _wait(plan: Plan) -> tuple[int, float]:
    """Return a sort key: whole seconds to the first token, then the faster generation."""
    ttft, decode = plan.prediction.ttft_s, plan.prediction.decode_tok_s
    seconds = ttft.range[1] if ttft is not None and ttft.range is not None else 1e9
    return round(seconds), -(decode[0] if decode else 0.0)


def _is_slower(other: Plan, plan: Plan) -> bool:
    """Return True if a plan for interactive use has a later first token than one that fits."""
    interactive = plan.verdict.fits is not False and other.objective == "latency"
    return interactive and _wait(other)[0] > _wait(plan)[0]


def _offer(plan: Plan, *, with_model: bool) -> str:
    parts: list[str] = []
    if decode := plan.prediction.decode_tok_s:
        parts.append(f"{format_range(decode)} tok/s")
    ttft = plan.prediction.ttft_s
    if ttft and ttft.range and plan.objective == "latency":
        parts.append(f"first token {format_range(ttft.range)} s")
    parts.append(plan.served_name)
    model = f" --model {plan.model.source}" if with_model else ""
    return f"stackctl up {plan.profile}{model}: " + ", ".join(parts)


def _shorter(plan: Plan, profile: Profile) -> str | None:
    """Return the advice on the longest prompt that meets the objective at the slow end, or None."""
    prefill, allowed = plan.prediction.prefill_tok_s, profile.slo.ttft_s
    if prefill is None or allowed is None or plan.verdict.fits is False:
        return None
    tokens = int(prefill[0] * allowed) // 10 * 10
    if not tokens:
        return None
    options = find_engine(plan.engine).advice.large_batches
    batches = [d for d in plan.decisions if d.field in options]
    set_so = ", ".join(f"{d.field.removesuffix('-size')} {d.value}" for d in batches)
    return f"shorter prompts: under {allowed:g} s up to about {tokens:,} tokens" + (
        f"; {set_so}" if set_so and not plan.placement.gpus else ""
    )


def format_range(pair: tuple[float, float]) -> str:
    """Return a range for people: ``25-38``."""
    return f"{_short(pair[0])}-{_short(pair[1])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def plan_summary(plan: Plan) -> str:
    """Return a plan in one line."""
    memory = plan.memory
    fits = {True: "fits", False: "does not fit", None: "memory unknown"}[plan.verdict.fits]
    limit = "" if memory.limit_bytes is None else f" of {format_bytes(memory.limit_bytes)}"
    return f"{plan.profile} · {plan.objective} · {fits} ({format_bytes(memory.total_bytes)}{limit})"
