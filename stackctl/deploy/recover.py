"""Ends what a crash, a power loss or a kill left half done."""

from __future__ import annotations

from stackctl.deploy import record
from stackctl.deploy.change import converge, settle
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import lock
from stackctl.values.transaction import Transaction


def recover(context: Context) -> Transaction | None:
    """Take the lock and end the change that is in the journal.

    Returns:
        What was ended; None when there was nothing to do.

    Raises:
        StackctlError: exit 7 while another stackctl is at work, which is then no crash.
    """
    # The file of a lock whose holder was killed says nothing any more: taking it removes it.
    if not context.journal.open and not context.paths.lock.exists():
        return None
    with lock.exclusive(context.paths.lock, "recover"):
        return recover_locked(context)


def recover_quietly(context: Context) -> None:
    """As every command begins: recover if there is something to, unless another one is at it."""
    try:
        recover(context)
    except StackctlError as error:
        if error.exit_code != ExitCode.LOCKED:
            raise


def recover_locked(context: Context) -> Transaction | None:
    """The same, for who holds the lock."""
    change = context.journal.read()
    if change is None:
        return None
    context.report.warn(
        f"{change.operation} of {change.stack} was cut off at the step '{change.step}': "
        + (f"ending it ({_goal(change)})" if change.committed else f"undoing it ({_goal(change)})")
    )
    # Interrupted, it leaves the journal to the next command.
    _settle_machine(context, change)
    context.journal.clear()
    record.done(
        context,
        change.operation,
        change.stack,
        generation=change.after if change.committed else change.before,
        result="recovered",
        message=_cut_off(change),
    )
    return change


def _settle_machine(context: Context, change: Transaction) -> None:
    store, stack = context.generations, change.stack
    number = change.after if change.committed else change.before
    winner = store.read(stack, number) if number is not None else None
    converge(context, stack, winner, running=change.committed or change.running)
    if not change.committed:
        if change.after is not None and change.after in store.numbers(stack):
            settle(context, store.read(stack, change.after), "interrupted", _cut_off(change))
        return
    if winner is not None and winner.outcome.state == "starting":
        store.finish(winner, "ready")
    if change.before in (None, change.after) or change.before not in store.numbers(stack):
        return
    store.finish(store.read(stack, change.before), "replaced" if winner else "stopped")


def _goal(change: Transaction) -> str:
    number = change.after if change.committed else change.before
    return f"generation {number}" if number is not None else "nothing runs"


def _cut_off(change: Transaction) -> str:
    return f"stackctl was ended at the step '{change.step}'"
