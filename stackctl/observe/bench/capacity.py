"""The capacity of a generation: tokens of a request, and requests at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.engines import engine as find_engine
from stackctl.observe.bench.matrix import Capacity
from stackctl.values.generation import EngineFact, Generation
from stackctl.values.plan import Plan

#: The defaults if neither plan nor engine has a value.
_CONTEXT, _SLOTS = 4096, 1


def serving_capacity(generation: Generation) -> Capacity:
    """Return the capacity of a generation."""
    return capacity_of_plan(generation.plan, generation.outcome.report)


def capacity_of_plan(plan: Plan, report: Sequence[EngineFact]) -> Capacity:
    """Return the capacity by the plan's decisions, else by the facts that the engine reported."""
    engine = find_engine(plan.engine)
    said = {fact.name: _number(fact.value) for fact in report}
    chosen = {d.field: _number(d.value) for d in plan.decisions}
    slots = chosen.get(engine.requests_option) or said.get("slots") or _SLOTS
    context = chosen.get(engine.context_option)
    if context and engine.shares_context:
        # This applies to a shared cache too, because all slots may be in use at once.
        context //= slots
    return Capacity(context=context or said.get("context") or _CONTEXT, slots=slots)


def _number(value: object) -> int | None:
    """Return a whole number above zero; None for others, such as --parallel -1 (automatic)."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number > 0 else None
