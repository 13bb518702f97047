"""Items of provisioning as lines: how each is, what would change, and what became of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stackctl.cli.output import Output

if TYPE_CHECKING:
    from stackctl.values.provision import ItemReport

_COLORS = {
    "ok": "green", "changed": "green", "undone": "green", "change": "yellow", "undo": "yellow",
    "kept": "yellow", "refused": "red", "skip": "cyan",
}  # fmt: skip


class Wide:
    """Tells of steps in the columns of items, whose names are longer than those of others."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def step(self, name: str, text: str) -> None:
        """See Report."""
        self._out.note(f"{'':<9}{name:<23}{text}")

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        """See Report."""
        self._out.progress(name, text, elapsed_s=elapsed_s)


def show(out: Output, one: ItemReport, *, full: bool) -> None:
    """An item in one line; of one that changes or is refused why, what and how back."""
    mark = "REFUSED" if one.status == "refused" else one.status
    problem = (one.problem or "").splitlines()
    head = problem[0] if problem else one.now or ""
    first, *more = textwrap.wrap(head, 48, break_long_words=False, break_on_hyphens=False) or [""]
    out.line(f"{out.style(f'{mark:<9}', _COLORS[one.status])}{one.item:<23}{first}".rstrip())
    for line in more:
        out.line(" " * 32 + line)
    if one.status not in ("change", "undo", "refused"):
        return
    if one.why:
        _labelled(out, "why", one.why)
    for line in problem[1:]:
        out.line(f"              {line}")
    for change in one.changes:
        _labelled(out, "does" if one.status == "change" else "undo", change.what)
        if change.diff and full:
            for line in change.diff.splitlines():
                out.line(f"              {line}")
        if change.command and full:
            out.line(f"              $ {change.command}")
    if one.undo and full:
        _labelled(out, "undo", one.undo)
    if one.effect == "login":
        _labelled(out, "when", "the user's service manager starts anew (next login, or boot)")
    if one.remedy:
        out.line(f"         fix: {one.remedy}")


def _labelled(out: Output, name: str, text: str) -> None:
    first, *more = textwrap.wrap(text, 67, break_long_words=False, break_on_hyphens=False)
    out.line(f"         {name:<4} {first}")
    for line in more:
        out.line(f"              {line}")


def wrapped(out: Output, text: str, indent: int) -> None:
    """Prose below a line of its own."""
    for line in textwrap.wrap(text, 80 - indent):
        out.line(" " * indent + line)


def count(number: int) -> str:
    """A number of items in words."""
    return "1 item" if number == 1 else f"{number} items"


def summary(reports: Sequence[ItemReport], verb: str) -> str:
    """How many did, and how many did not."""
    counted = {status: sum(one.status == status for one in reports) for status in _COLORS}
    changed = sum(counted[status] for status in ("change", "changed", "undo", "undone"))
    parts = [f"{count(changed)} {verb}"]
    if counted["ok"]:
        parts.append(f"{counted['ok']} as it should be")
    if counted["skip"]:
        parts.append(f"{counted['skip']} not needed")
    for status in ("refused", "kept"):
        if counted[status]:
            parts.append(f"{counted[status]} {status}")
    return ", ".join(parts)
