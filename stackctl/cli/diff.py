"""``stackctl diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_and_numbers
from stackctl.cli.plan import value_text
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.values.history import DiffReport

_COLORS = {"+": "green", "-": "red", "@": "cyan"}


@stackctl_command("diff")
@click.argument("words", metavar="[STACK] [A] [B]", nargs=-1)
def command(session: Session, words: tuple[str, ...]) -> None:
    """Show the differences between generations A and B of STACK.

    B defaults to the installed generation, and A to the one that served before it. Decisions come
    with the reason of B, units as a unified diff without the numbers of the generations.
    """
    from stackctl.observe.history import diff_report

    context = session.context(recover="try")
    stack, numbers = stack_and_numbers(words, 2)
    before, after, *_ = (*numbers, None, None)
    found = diff_report(context, pick_stack(context, stack, past=True), before, after)
    if not session.out.wrote_json(found):
        _show(session, found)


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
