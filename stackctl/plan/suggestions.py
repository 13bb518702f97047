"""Changes of a profile with which a plan that is too big would fit, each verified by a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from stackctl.engines import engine as find_engine
from stackctl.engines import uses_gpu
from stackctl.quantity import format_bytes
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Claim, Plan
from stackctl.values.profile import Profile

#: Step and minimum of the contexts that are offered, in tokens.
_STEP = 256
_LEAST_CONTEXT = 512

Attempt = Callable[[Profile, Sequence[Claim]], Plan]


def largest_fitting(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number in a range that fits, by bisection; the lowest if none does."""
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def suggest_changes(
    host: Host,
    model: Model,
    profile: Profile,
    plan: Plan,
    claims: Sequence[Claim],
    attempt: Attempt,
) -> tuple[str, ...]:
    """Return changes for a plan that does not fit, with the smallest loss first.

    ``attempt`` plans a changed profile beside the given claims, without alternatives.
    """

    def fits(changed: Profile, beside: Sequence[Claim] = claims) -> bool:
        return attempt(changed, beside).verdict.fits is True

    found = _contexts(model, profile, fits)
    for kind in find_engine(profile.engine).kv_types:
        if profile.kv_type in (None, "f16", "auto"):
            smaller = msgspec.structs.replace(profile, kv_type=kind)
            if fits(smaller):
                found.append(f"a smaller KV cache: --set kv_type={kind}")
                break
            if not found and (both := _contexts(model, smaller, fits)):
                found.append(f"{both[0]} --set kv_type={kind}")
                break
    found += _fewer(profile, fits)
    found += _elsewhere(host, model, profile, fits)
    for claim in claims:
        rest = [other for other in claims if other.stack != claim.stack]
        if fits(profile, rest):
            found.append(
                f"without {claim.stack}, which runs beside it: stackctl down {claim.stack}"
            )
    found.append(_lighter(plan))
    return tuple(dict.fromkeys(found))


def _largest(
    profile: Profile, key: str, low: int, high: int, step: int, fits: Callable[[Profile], bool]
) -> int | None:
    """Return the largest value of a key that fits, in steps; None if even the lowest does not."""

    def fits_at(steps: int) -> bool:
        return fits(msgspec.structs.replace(profile, **{key: steps * step}))

    return largest_fitting(low, high, fits_at) * step if fits_at(low) else None


def _contexts(model: Model, profile: Profile, fits: Callable[[Profile], bool]) -> list[str]:
    if not isinstance(profile.context, int):
        return []
    most = min(profile.context, model.context or profile.context) // _STEP
    least = _LEAST_CONTEXT // _STEP
    found = _largest(profile, "context", least, most, _STEP, fits) if most > least else None
    return [f"a smaller context: --set context={found}"] if found else []


def _fewer(profile: Profile, fits: Callable[[Profile], bool]) -> list[str]:
    """Return the advice to serve fewer requests at once, if each has a KV cache of its own."""
    count = profile.concurrency
    if find_engine(profile.engine).requests_share_cache or not isinstance(count, int) or count == 1:
        return []
    found = _largest(profile, "concurrency", 1, count - 1, 1, fits)
    return [f"fewer requests at once: --set concurrency={found}"] if found else []


def _elsewhere(
    host: Host, model: Model, profile: Profile, fits: Callable[[Profile], bool]
) -> list[str]:
    """Return the advice to use more GPUs, or main memory for the experts."""
    found = []
    if not uses_gpu(profile):
        return []
    wish, engine = profile.placement, find_engine(profile.engine)
    if len(host.gpus) > 1 and str(wish.gpus) != "all":
        more = msgspec.structs.replace(wish, gpus="all")
        if fits(msgspec.structs.replace(profile, placement=more)):
            found.append("over all GPUs: --set placement.gpus=all")
    if engine.splits_experts and model.experts and wish.cpu_experts != "auto":
        beside = msgspec.structs.replace(wish, cpu_experts="auto")
        if fits(msgspec.structs.replace(profile, placement=beside)):
            found.append("experts in main memory: --set placement.cpu_experts=auto")
    return found


def _lighter(plan: Plan) -> str:
    """Return the advice to use a smaller model, with the largest size of the weights."""
    budgets = [plan.memory, *([plan.host_memory] if plan.host_memory else [])]
    short = min(budgets, key=lambda budget: budget.headroom_bytes or 0)
    most = short.weights_bytes + (short.headroom_bytes or 0)
    if most > 0.2 * short.weights_bytes:
        return (
            f"weights of {format_bytes(most)} at most: a stronger quantisation, or a smaller model"
        )
    return "a smaller model: --model SOURCE"
