"""Completes or reverts changes that a crash, a power loss or a kill has interrupted."""

from __future__ import annotations

from stackctl.deploy import deployment_records
from stackctl.deploy.context import Context
from stackctl.deploy.transaction import reconcile, store_failure
from stackctl.errors import ExitCode, StackctlError, StartFailed
from stackctl.machine import lock
from stackctl.values.transaction import Transaction


def recover(context: Context) -> Transaction | None:
    """Take the lock, and complete or revert the change in the journal.

    Returns:
        That change; None if there was none.

    Raises:
        StartFailed: the change has ended, but its generation does not come up.
        StackctlError: exit 7 while another stackctl is at work: the change is then still running.
    """
    # A killed process leaves its lock file behind: taking the lock removes it.
    if not context.journal.is_open and not context.paths.lock.exists():
        return None
    with lock.exclusive(context.paths.lock, "recover"):
        return recover_locked(context)


def recover_quietly(context: Context, *, must: bool) -> None:
    """Recover at the start of a command, unless another stackctl is at work.

    Without ``must`` a failure is only a warning: commands that show the state must still work. An
    engine that does not come up is always a warning.
    """
    try:
        recover(context)
    except StackctlError as error:
        if error.exit_code == ExitCode.LOCKED:
            return
        if must and not isinstance(error, StartFailed):
            raise
        context.progress.warn(error.message, error.hint)


def recover_first(context: Context) -> None:
    """Recover before a change, with the lock held; an engine that does not start is a warning."""
    try:
        recover_locked(context)
    except StartFailed as error:
        context.progress.warn(error.message, error.hint)


def recover_locked(context: Context) -> Transaction | None:
    """Recover as ``recover`` does, with the lock held."""
    change = context.journal.read()
    if change is None:
        return None
    context.progress.warn(
        f"{change.operation} of {change.stack} was cut off at the step '{change.step}': "
        + (f"ending it ({_goal(change)})" if change.committed else f"undoing it ({_goal(change)})")
    )
    # If this is interrupted, the journal stays for the next command.
    try:
        problem = _settle_machine(context, change)
        record_end(context, change)
        context.journal.clear()
    except StackctlError as error:
        error.message = f"cannot recover {change.stack}: {error.message}"
        again = f"stackctl recover tries again; stackctl down {change.stack} gives it up"
        error.hint = f"{error.hint}\n{again}" if error.hint else again
        raise
    deployment_records.write_audit_entry(
        context,
        change.operation,
        change.stack,
        generation=change.winner,
        result="recovered",
        message=_cut_off(change),
    )
    if problem is not None:
        problem.message = f"{_goal(change)} of {change.stack} is installed again, but {problem}"
        raise problem
    return change


def record_end(context: Context, change: Transaction) -> None:
    """Store the outcomes of the generations of an interrupted change."""
    store, stack = context.generations, change.stack
    known = store.numbers(stack)
    if not change.committed:
        if change.after in known:
            store_failure(context, store.read(stack, change.after), "interrupted", _cut_off(change))
        return
    if change.after in known:
        winner = store.read(stack, change.after)
        if winner.outcome.state == "starting":
            store.set_outcome(winner, "ready")
    if change.before != change.after and change.before in known:
        ended = store.read(stack, change.before)
        store.set_outcome(ended, "replaced" if change.after is not None else "stopped")


def _settle_machine(context: Context, change: Transaction) -> StartFailed | None:
    number, stack = change.winner, change.stack
    winner = context.generations.read(stack, number) if number is not None else None
    return reconcile(context, stack, winner, running=change.committed or change.running)


def _goal(change: Transaction) -> str:
    return f"generation {change.winner}" if change.winner is not None else "nothing runs"


def _cut_off(change: Transaction) -> str:
    return f"stackctl was ended at the step '{change.step}'"
