"""Removes old generations."""

from __future__ import annotations

from stackctl.deploy.context import Context
from stackctl.deploy.record import done, installed_number
from stackctl.deploy.transaction import writer
from stackctl.errors import StackctlError
from stackctl.values.history import PruneReport


def prune(context: Context, stack: str, *, keep: int, dry_run: bool) -> PruneReport:
    """Remove all but the ``keep`` (1 or more) newest generations of a stack.

    The installed one stays, and the one that a rollback goes back to. So does the newest, whatever
    became of it: numbers are given once.

    Raises:
        StackctlError: exit 7 while another stackctl is at work, 1 when the user said no.
    """
    with writer(context, f"prune {stack}", dry_run):
        chosen = _choose(context, stack, keep, dry_run)
        if dry_run or not chosen.removed:
            return chosen
        words = f"{len(chosen.removed)} of {len(chosen.removed) + len(chosen.kept)}"
        if not context.confirm(f"{words} generations of {stack} would be removed for good"):
            raise StackctlError("nothing was changed")
        for number in chosen.removed:
            context.generations.remove(stack, number)
        listed = ", ".join(map(str, chosen.removed))
        done(context, "prune", stack, message=f"removed {listed}")
        return chosen


def _choose(context: Context, stack: str, keep: int, dry_run: bool) -> PruneReport:
    numbers = context.generations.numbers(stack)
    current = installed_number(context, stack)
    target = context.generations.to_go_back_to(stack, current)
    kept = {*numbers[-max(1, keep) :], current, target.number if target else None}
    return PruneReport(
        stack=stack,
        dry_run=dry_run,
        removed=tuple(number for number in numbers if number not in kept),
        kept=tuple(number for number in numbers if number in kept),
    )
