"""What deployments leave on record: the audit log, and which generation is installed."""

from __future__ import annotations

from stackctl.deploy import install
from stackctl.deploy.context import Context
from stackctl.errors import StackctlError
from stackctl.state import audit
from stackctl.state.generations import now
from stackctl.units.render import generation_of
from stackctl.values.history import AuditEntry, AuditResult


def done(
    context: Context,
    operation: str,
    stack: str,
    *,
    result: AuditResult = "done",
    generation: int | None = None,
    message: str | None = None,
) -> None:
    """Add to the audit log. It happened all the same when that fails: then it is only told."""
    entry = AuditEntry(
        when=now(),
        user=audit.user(),
        operation=operation,
        stack=stack,
        generation=generation,
        result=result,
        message=message,
    )
    try:
        audit.record(context.paths.state, entry)
    except StackctlError as problem:
        context.report.warn(f"not in the audit log: {problem.message}")


def installed_number(context: Context, stack: str) -> int | None:
    """The number of the generation whose units are installed; None when none is."""
    numbers = (generation_of(file.text) for file in install.installed(context, stack))
    return next((number for number in numbers if number is not None), None)
