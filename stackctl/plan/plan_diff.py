"""Differences between two plans. Pure."""

from __future__ import annotations

from stackctl.values.history import FieldChange
from stackctl.values.plan import Decision, Plan


def changed_decisions(before: Plan, after: Plan) -> tuple[FieldChange, ...]:
    """Return the decisions whose values differ, in the plans' order, with the later reason."""
    old = {decision.field: decision for decision in before.decisions}
    new = {decision.field: decision for decision in after.decisions}
    found = []
    for field in dict.fromkeys((*new, *old)):
        was, now = old.get(field), new.get(field)
        if was is None or now is None or was.value != now.value:
            found.append(
                FieldChange(
                    field=field,
                    before=was.value if was else None,
                    after=now.value if now else None,
                    reason=reason_with_source(now)
                    if now
                    else f"not set; was: {was.reason if was else ''}",
                )
            )
    return tuple(found)


def reason_with_source(decision: Decision) -> str:
    """Return the reason of a decision, with its source if the user chose the value."""
    if decision.source in ("derived", "measured"):
        return decision.reason
    return f"{decision.reason} ({decision.source})"
