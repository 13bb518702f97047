"""The output of commands: data on stdout, all else on stderr. Colour is never the only sign."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import IO, Literal

import click

from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_duration
from stackctl.values.base import Value, to_json
from stackctl.values.result import ErrorReport, Result

Color = Literal["auto", "always", "never"]
#: A label and a text beside it.
Row = tuple[str, str]
_STATUS_COLOR = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "cyan", "info": "cyan"}
_DIFF_COLORS = {"+": "green", "-": "red", "@": "cyan"}
_NAME_WIDTH = 10
#: The width of the column with a check's status.
_MARK_WIDTH = 6
#: The width of all output except commands, and tables on a wide terminal.
WIDTH = 80
#: A space at which ``labelled_lines`` does not wrap.
NO_BREAK = "\xa0"
#: Without a live line: seconds before the first plain line of a long step, and between later ones.
_SOON_S, _AGAIN_S = 5, 30
#: Control characters that a terminal obeys, except colours, tabs and line ends.
_COMMANDS = re.compile(r"(?!\x1b\[[\d;]*m)[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Output:
    """Printer of one command's output. It implements the ``Progress`` of deployments."""

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        color: Color = "auto",
        progress: bool = False,
    ) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._color = color
        self._live = progress and not quiet and sys.stderr.isatty()
        self._shown = False
        self._last: tuple[str, str] | None = None
        self._told = ("", 0.0)

    def data(self, value: Value) -> None:
        """Print a document as JSON on stdout."""
        self._clear()
        sys.stdout.write(to_json(value))

    def wrote_json(self, value: Value) -> bool:
        """Print a document and return True if --json is given."""
        if self.json:
            self.data(value)
        return self.json

    def line(self, text: str = "") -> None:
        """Print a line of data on stdout."""
        self._clear()
        sys.stdout.write(sanitize_terminal(text) + "\n")

    def text(self, text: str) -> None:
        """Print a text document on stdout, unchanged."""
        self._clear()
        sys.stdout.write(text)

    def note(self, text: str) -> None:
        """Print a note on stderr, unless --quiet is given."""
        if not self.quiet:
            self._say(text)

    def step(self, name: str, text: str) -> None:
        """See Progress: print a finished step, one line on stderr."""
        self.note(f"{name:<{_NAME_WIDTH}}{text}")

    def changes(
        self, title: str, rows: Sequence[tuple[str, str, str]], notes: Sequence[str]
    ) -> None:
        """See Progress."""
        self.note(title)
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        for field, now, then in rows:
            self.note(f"  {field:<{widths[0]}}  {now:<{min(widths[1], 24)}} -> {then}")
        for text in notes:
            self.note(text)

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        """See Progress: rewrite one line on a terminal.

        Elsewhere print only progress with ``elapsed_s``, a plain line now and then.
        """
        if elapsed_s is not None:
            if not self._live:
                self._plainly(name, text, elapsed_s)
                return
            text = f"{text}  ·  {format_duration(elapsed_s)}"
        if not self._live or self._last == (name, text):
            return
        self._last = (name, text)
        width = shutil.get_terminal_size().columns
        _tell("\r\033[K" + sanitize_terminal(f"{name:<{_NAME_WIDTH}}{text}")[: width - 1])
        self._shown = True

    def _plainly(self, name: str, text: str, elapsed_s: float) -> None:
        """Print a line for each new phase, ignoring its numbers, and one every half minute."""
        phase = re.sub(r"\d[\d,.]*", "", text)
        last, told_s = self._told
        again = elapsed_s - told_s >= _AGAIN_S if elapsed_s >= told_s else True
        if elapsed_s >= _SOON_S and (phase != last or again):
            self._told = (phase, elapsed_s)
            self.step(name, f"{text}  ·  {format_duration(elapsed_s)}")

    def warn(self, text: str, fix: str | None = None) -> None:
        """See Progress: print a warning, even with --quiet."""
        self._say(self.style("warning:", "yellow", sys.stderr) + f" {text}")
        for line in _fix_lines(fix, 2):
            self._say(line)

    def error(self, error: StackctlError) -> None:
        """Print an error, its details and its hint; with --json a stackctl.error/1 on stdout."""
        if self.json:
            self.data(
                ErrorReport(
                    message=error.message,
                    hint=error.hint,
                    details=error.details,
                    exit_code=int(error.exit_code),
                )
            )
            return
        self._say(self.style("error:", "red", sys.stderr) + f" {error.message}")
        # A refusal has sentences, and the hint for an unknown name a list. Other details and hints
        # may be commands, which must stay on one line.
        prose = error.exit_code in (ExitCode.REFUSED, ExitCode.NOT_FOUND)
        for detail in error.details:
            self._indented(detail, wrap=prose)
        if error.hint:
            first, *more = error.hint.splitlines()
            label = "hint: "
            first, *rest = _wrapped(label + first) if prose else [label + first]
            self._say(self.style(label.rstrip(), "cyan", sys.stderr) + first[len(label) - 1 :])
            for line in rest:
                self._say(line)
            for line in more:
                self._indented(line, wrap=prose)

    def results(self, results: Sequence[Result]) -> None:
        """Print results of checks, one a line; failures and warnings with evidence and remedy."""
        width = max((len(result.name) for result in results), default=0) + 2
        for result in results:
            column = _MARK_WIDTH + width
            # A skipped check has its reason in the evidence.
            seen = result.actual or (result.status == "skip" and result.evidence) or ""
            self.marked(
                _mark(result.status), result.name, seen, column=column,
                mark_width=_MARK_WIDTH, color=_STATUS_COLOR[result.status],
            )  # fmt: skip
            if result.status in ("fail", "warn"):
                told = (f"expected {result.expected}" if result.expected else "", result.evidence)
                for text in filter(None, told):
                    self.labelled("", text, column=column)
                self.fix(result.remedy, indent=column)

    def labelled(
        self, label: str, text: str, *, column: int, indent: int = 0, color: str | None = None
    ) -> None:
        """Print a label and, from ``column`` on, a text: see ``labelled_lines``."""
        first, *more = labelled_lines(label, text, column=column, indent=indent)
        head = self.style(first[:column], color) if color else first[:column]
        self.line((head + first[column:]).rstrip())
        for line in more:
            self.line(line)

    def properties(self, rows: Sequence[Row]) -> None:
        """Print names and values, the values in one column."""
        column = max(len(name) for name, _ in rows) + 2
        for name, text in rows:
            self.labelled(name, text, column=column)

    def marked(
        self, mark: str, name: str, text: str, *, column: int, mark_width: int, color: str
    ) -> None:
        """Print a coloured mark, a name and, from ``column`` on, a text."""
        first, *more = labelled_lines(f"{mark:<{mark_width}}{name}", text, column=column)
        self.line((self.style(first[:mark_width], color) + first[mark_width:]).rstrip())
        for line in more:
            self.line(line)

    def fix(self, text: str | None, *, indent: int) -> None:
        """Print the commands of a remedy. They are never wrapped, so that they can be pasted."""
        for line in _fix_lines(text, indent):
            self.line(line)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, fold: int) -> None:
        """Print a table; column number ``fold`` takes the rest of the width and wraps."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        self._clear()
        width = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for number, name in enumerate(head):
            if number == fold:
                table.add_column(name, overflow="fold", ratio=1)
            else:
                table.add_column(name, overflow="fold", max_width=max(16, width * 7 // 20))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console = Console(
            file=sys.stdout,
            width=width,
            no_color=not self.colored(sys.stdout),
            force_terminal=self.colored(sys.stdout) or None,
            highlight=False,
            markup=False,
        )
        with console.capture() as capture:
            console.print(table)
        for text in capture.get().splitlines():
            sys.stdout.write(sanitize_terminal(text).rstrip() + "\n")

    def style(self, text: str, color: str, stream: IO[str] | None = None) -> str:
        """Return the text in a colour if the stream (default: stdout) is coloured."""
        return click.style(text, fg=color) if self.colored(stream or sys.stdout) else text

    def diff_line(self, line: str) -> str:
        """Return a line of a unified diff in its colour."""
        color = _DIFF_COLORS.get(line[:1])
        return self.style(line, color) if color else line

    def colored(self, stream: IO[str]) -> bool:
        """Return True if a stream is coloured: by --color, else NO_COLOR and TERM, else isatty."""
        if self._color != "auto":
            return self._color == "always"
        # click ignores NO_COLOR; https://no-color.org asks for it to be heeded when not empty.
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return stream.isatty()

    def _indented(self, text: str, *, wrap: bool) -> None:
        for line in _wrapped(text) if wrap else [text]:
            self._say(f"  {line}")

    def _say(self, text: str) -> None:
        self._clear()
        # stdout is buffered in a pipe: without the flush the lines would change their order.
        if sys.stdout is not None:
            sys.stdout.flush()
        _tell(sanitize_terminal(text) + "\n")

    def _clear(self) -> None:
        if self._shown:
            _tell("\r\033[K")
            self._shown = False


def _tell(text: str) -> None:
    """Write to stderr. A stderr that is closed must not stop a deployment half-way."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def sanitize_terminal(text: str) -> str:
    """Escape the control characters in a text, such as an engine's log or a file's name."""
    return _COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)


def labelled_lines(label: str, text: str, *, column: int, indent: int = 0) -> list[str]:
    """Return a label and, from ``column`` on, a text, in lines of at most 80 columns.

    A word such as a path is never cut. ``NO_BREAK`` keeps two words on one line and is printed as
    a space. A label that is too long moves the text of its line.
    """
    lines = textwrap.wrap(
        text, max(40, WIDTH - column), break_long_words=False, break_on_hyphens=False
    )
    first, *more = lines or [""]
    head = f"{'':<{indent}}{label}"
    head = head.ljust(column) if len(head) < column or not label else f"{head} "
    found = [f"{head}{first}".rstrip(), *(" " * column + line for line in more)]
    return [line.replace(NO_BREAK, " ") for line in found]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH - 2, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _fix_lines(text: str | None, indent: int) -> list[str]:
    return [
        f"{'':<{indent}}{'fix: ' if number == 0 else '     '}{line}"
        for number, line in enumerate((text or "").splitlines())
    ]


def _mark(status: str) -> str:
    """Return the word for a status. FAIL is in capitals, so that it stands out without colour."""
    return "FAIL" if status == "fail" else status
