"""The audit log of deployments."""

from __future__ import annotations

from stackctl.deploy.context import Context
from stackctl.errors import StackctlError
from stackctl.state import audit
from stackctl.state.generations import utc_now
from stackctl.values.history import AuditEntry, AuditResult


def write_audit_entry(
    context: Context,
    operation: str,
    stack: str,
    *,
    result: AuditResult = "done",
    generation: int | None = None,
    message: str | None = None,
) -> None:
    """Add an entry to the audit log. A failure is only a warning: the operation is done."""
    entry = AuditEntry(
        when=utc_now(),
        user=audit.current_user(),
        operation=operation,
        stack=stack,
        generation=generation,
        result=result,
        message=message,
    )
    try:
        audit.record(context.paths.state, entry)
    except StackctlError as problem:
        context.progress.warn(f"not in the audit log: {problem.message}")
