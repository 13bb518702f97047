"""What a generation serves: tokens of a request, and requests at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.engines import engine as find_engine
from stackctl.observe.bench.matrix import Limits
from stackctl.values.generation import Fact, Generation
from stackctl.values.plan import Plan

#: Where neither plan nor engine tells.
_CONTEXT, _SLOTS = 4096, 1


def limits(generation: Generation) -> Limits:
    """What a generation serves."""
    return limits_of(generation.plan, generation.outcome.report)


def limits_of(plan: Plan, report: Sequence[Fact]) -> Limits:
    """By the plan's decisions; where an option was left to the engine, by what the engine said."""
    engine = find_engine(plan.engine)
    said = {fact.name: _number(fact.value) for fact in report}
    chosen = {d.field: _number(d.value) for d in plan.decisions}
    slots = chosen.get(engine.requests_option) or said.get("slots") or _SLOTS
    context = chosen.get(engine.context_option)
    if context and engine.shares_context:
        # Also where slots share one cache: all of them may be asked at once.
        context //= slots
    return Limits(context=context or said.get("context") or _CONTEXT, slots=slots)


def _number(value: object) -> int | None:
    """A whole number above zero; with others an engine is told to choose itself (--parallel -1)."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number > 0 else None
