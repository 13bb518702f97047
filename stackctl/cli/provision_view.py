"""Items of provisioning as lines: their status, their changes, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stackctl.cli.output import Output

if TYPE_CHECKING:
    from stackctl.values.provision import ItemReport, ProvisionReport

#: The columns of the item's name, of the text beside it, and of the text beside a label.
_MARK, _TEXT, _DETAIL = 9, 32, 14
#: The column of the texts of firmware advice.
_ADVICE = 20
_COLORS = {
    "ok": "green", "changed": "green", "undone": "green", "change": "yellow", "undo": "yellow",
    "kept": "yellow", "refused": "red", "skip": "cyan",
}  # fmt: skip


class IndentedProgress:
    """Prints steps in the columns of items, whose names are longer; see StepProgress."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def step(self, name: str, text: str) -> None:
        """See StepProgress."""
        self._out.note(f"{'':<{_MARK}}{name:<{_TEXT - _MARK}}{text}")

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        """See StepProgress."""
        self._out.progress(name, text, elapsed_s=elapsed_s)


def show_item(out: Output, one: ItemReport, *, full: bool) -> None:
    """Print an item: its status, and for a change or a refusal the reason, the change and its undo.

    ``full`` adds diffs and commands.
    """
    mark = "REFUSED" if one.status == "refused" else one.status
    problem = (one.problem or "").splitlines()
    out.marked(
        mark, one.item, problem[0] if problem else one.now or "", column=_TEXT,
        mark_width=_MARK, color=_COLORS[one.status],
    )  # fmt: skip
    if one.status not in ("change", "undo", "refused"):
        return
    _row(out, "why", one.why)
    _verbatim(out, problem[1:])
    for change in one.changes:
        _row(out, "does" if one.status == "change" else "undo", change.what)
        if full:
            _verbatim(out, (change.diff or "").splitlines())
            _verbatim(out, [f"$ {change.command}"] if change.command else [])
    _row(out, "undo", one.undo if full else None)
    if one.effect == "login":
        _row(out, "when", "the user's service manager starts anew (next login, or boot)")
    out.fix(one.remedy, indent=_MARK)


def _row(out: Output, label: str, text: str | None) -> None:
    if text:
        out.labelled(label, text, indent=_MARK, column=_DETAIL)


def _verbatim(out: Output, lines: Sequence[str]) -> None:
    """Print lines of a diff and commands, which are never wrapped."""
    for line in lines:
        out.line(" " * _DETAIL + line)


def show_end(out: Output, report: ProvisionReport, stay: Sequence[tuple[str, str]] = ()) -> None:
    """Print the pending effects, the firmware advice, and how many items changed.

    Print first the changes that could not be undone: ``stay`` has (item, reason).
    """
    for item, reason in stay:
        out.labelled("kept", f"{item}: {reason}", column=_MARK)
    for text in report.pending:
        out.labelled("pending", text, column=_MARK)
    if report.advice:
        out.line("for the firmware's setup (BIOS), which stackctl never touches")
        for tip in report.advice:
            out.labelled(tip.name, tip.actual or "", indent=2, column=_ADVICE)
            out.labelled("", tip.evidence or "", column=_ADVICE)
    planned, made = ("would change", "changed")
    if report.operation == "undo":
        planned, made = ("would go back", "as before")
    if report.operation == "undo" and not report.items:
        out.line("nothing to take back")
    else:
        out.line(_summary(report.items, planned if report.dry_run else made))


def count_text(number: int) -> str:
    """Return a number of items as text, such as "2 items"."""
    return "1 item" if number == 1 else f"{number} items"


def _summary(reports: Sequence[ItemReport], verb: str) -> str:
    """Return the number of changed items with ``verb``, then those that did not change."""
    counted = {status: sum(one.status == status for one in reports) for status in _COLORS}
    changed = sum(counted[status] for status in ("change", "changed", "undo", "undone"))
    parts = [f"{count_text(changed)} {verb}"]
    if counted["ok"]:
        parts.append(f"{counted['ok']} as it should be")
    if counted["skip"]:
        parts.append(f"{counted['skip']} not needed")
    for status in ("refused", "kept"):
        if counted[status]:
            parts.append(f"{counted[status]} {status}")
    return ", ".join(parts)
