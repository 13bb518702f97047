"""``stackctl diff``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from stackctl.cli.plan import value_text
from stackctl.cli.session import Session, pick_stack, verb
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.values.history import DiffReport

_NUMBER = re.compile("[0-9]{1,9}")
_COLORS = {"+": "green", "-": "red", "@": "cyan"}


@verb("diff")
@click.argument("words", metavar="[STACK] [A] [B]", nargs=-1)
def command(session: Session, words: tuple[str, ...]) -> None:
    """Show what differs between generations A and B of STACK.

    Left out, B is the generation that is installed and A the one that served before it. Decisions
    come with the reason of B; units as a unified diff, without their generation's number.
    """
    from stackctl.observe.difference import report

    context = session.context(recover="try")
    stack, before, after = _understood(words)
    found = report(context, pick_stack(context, stack, past=True), before, after)
    if session.out.json:
        session.out.data(found)
    else:
        _show(session, found)


def _understood(words: Sequence[str]) -> tuple[str | None, int | None, int | None]:
    """Words that are numbers are generations, another is the stack."""
    numbers = [int(word) for word in words if _NUMBER.fullmatch(word)]
    names = [word for word in words if not _NUMBER.fullmatch(word)]
    if len(names) > 1 or len(numbers) > 2:
        raise StackctlError(
            "diff takes one stack and two generations at most",
            hint="stackctl diff STACK A B",
            exit_code=ExitCode.USAGE,
        )
    before, after, *_ = (*numbers, None, None)
    return (names[0] if names else None), before, after


def _show(session: Session, found: DiffReport) -> None:
    out = session.out
    out.line(f"{found.stack}: generation {found.before} -> {found.after}")
    if not (found.facts or found.decisions or found.units):
        out.line("nothing differs")
        return
    number_a, number_b = str(found.before), str(found.after)
    if found.facts:
        out.line()
        rows = [(c.field, value_text(c.before), value_text(c.after)) for c in found.facts]
        out.table(("WHAT", number_a, number_b), rows, fold=2)
    if found.decisions:
        out.line()
        out.table(
            ("FIELD", number_a, number_b, "WHY"),
            [
                (c.field, value_text(c.before), value_text(c.after), c.reason or "")
                for c in found.decisions
            ],
            fold=3,
        )
    for unit in found.units:
        out.line()
        for line in unit.diff.removesuffix("\n").split("\n"):
            color = _COLORS.get(line[:1])
            out.line(out.style(line, color) if color else line)
