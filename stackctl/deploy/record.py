"""What deployments leave on record: the audit log, and which generation is installed."""

from __future__ import annotations

from stackctl.deploy import install
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.state import audit
from stackctl.state.generations import now
from stackctl.units.render import generation_of
from stackctl.values.generation import Generation
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


def newest(context: Context, stack: str) -> Generation:
    """The generation that is installed, else the last one that served, else the last of all.

    Raises:
        StackctlError: exit 4 when there is none.
    """
    number = installed_number(context, stack)
    if number is not None:
        return context.generations.read(stack, number)
    found = [
        context.generations.read(stack, number)
        for number in reversed(context.generations.numbers(stack))
    ]
    served = (one for one in found if one.outcome.state not in ("failed", "interrupted"))
    chosen = next(served, next(iter(found), None))
    if chosen is None:
        raise StackctlError(
            f"{stack} has no generation",
            hint=f"stackctl up {stack}",
            exit_code=ExitCode.NOT_FOUND,
        )
    return chosen
