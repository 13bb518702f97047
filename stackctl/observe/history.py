"""The history of a stack's generations, and the audit log."""

from __future__ import annotations

from collections.abc import Mapping

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_number
from stackctl.errors import StackctlError
from stackctl.state import logs
from stackctl.values.history import AuditReport, HealthEntry, HistoryEntry, HistoryReport


def history_report(context: Context, stack: str) -> HistoryReport:
    """Return all generations of a stack, newest first; report a damaged record as unreadable."""
    current = installed_number(context, stack)
    seen = _last_seen(context, stack)
    numbers = reversed(context.generations.numbers(stack))
    return HistoryReport(
        scope=context.paths.scope,
        stack=stack,
        generations=tuple(_entry(context, stack, number, current, seen) for number in numbers),
    )


def audit_report(context: Context, stack: str | None) -> AuditReport:
    """Return the audit log; of all stacks if ``stack`` is None."""
    entries = logs.read_changes(context.paths.state)
    return AuditReport(
        scope=context.paths.scope,
        stack=stack,
        entries=tuple(entry for entry in entries if stack in (None, entry.stack)),
    )


def _last_seen(context: Context, stack: str) -> Mapping[int | None, HealthEntry]:
    try:
        return {seen.generation: seen for seen in logs.read_health(context.paths.state, stack)}
    except StackctlError as error:
        context.progress.warn(error.message, error.hint)
        return {}


def _entry(
    context: Context,
    stack: str,
    number: int,
    current: int | None,
    seen: Mapping[int | None, HealthEntry],
) -> HistoryEntry:
    try:
        generation = context.generations.read(stack, number)
    except StackctlError as error:
        return HistoryEntry(
            number=number,
            current=number == current,
            state="unreadable",
            message="; ".join(error.details) or error.message,
            health=seen.get(number),
        )
    plan, outcome = generation.plan, generation.outcome
    return HistoryEntry(
        number=number,
        current=number == current,
        created=generation.created,
        operation=generation.operation,
        of=generation.of,
        profile=plan.profile,
        objective=plan.objective,
        model=plan.model.source,
        image=generation.image,
        state=outcome.state,
        changed=outcome.changed,
        message=outcome.message,
        ready_s=outcome.ready_s,
        health=seen.get(number),
    )
