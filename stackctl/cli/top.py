"""``stackctl top``."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import duration_option, pick_stack, running_stack, stack_argument
from stackctl.cli.output import sanitize_terminal
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import truncate

if TYPE_CHECKING:
    from stackctl.observe.top import TopRow

_INTERVAL_S = 2.0
_ONCE_S = 1.0
_LEAST_S = 0.2
#: Heading, its unit below it, width.
_COLUMNS = (
    ("IN", "tok/s", 6), ("OUT", "tok/s", 6), ("RUN", "", 3), ("WAIT", "", 4), ("KV", "", 5),
    ("HITS", "", 4), ("TTFT", "p95", 6), ("ITL", "p95", 6), ("CPU", "cores", 5), ("GPU", "", 4),
)  # fmt: skip
_STACK_WIDTH = 79 - sum(width + 1 for *_, width in _COLUMNS)


@stackctl_command("top")
@stack_argument
@duration_option("--interval", "Time between samples; default 2s.")
@click.option("--once", is_flag=True, help="Print one sample of one second and exit.")
def command(session: Session, stack: str | None, interval: float | None, once: bool) -> None:
    """Watch all stacks, or STACK: speed, requests, KV cache, latencies, CPU and GPU.

    Ctrl-C ends it (exit 130). Without a terminal it prints lines. The mark ~ is for
    estimates, for engines that report no KV use or latencies; - is for unknown values.
    """
    from stackctl.deploy import unit_files
    from stackctl.observe.top import TopSampler

    if interval is not None and interval < _LEAST_S:
        raise StackctlError(f"--interval: at least {_LEAST_S:g}s", exit_code=ExitCode.USAGE)
    if session.out.json:
        raise StackctlError(
            "top does not support --json", hint="stackctl metrics --json", exit_code=ExitCode.USAGE
        )
    context = session.context(recover="try")
    if stack is not None:
        stack = running_stack(context, stack)
    elif not unit_files.installed_stacks(context):
        pick_stack(context, None)  # raises because no stack is up
    sampler, every_s = TopSampler(context), interval or (_ONCE_S if once else _INTERVAL_S)

    def sample() -> Sequence[TopRow]:
        # The stacks may change while top runs.
        return sampler.sample((stack,) if stack else unit_files.installed_stacks(context))

    try:
        if once or not sys.stdout.isatty():
            _lines(session, sample, every_s, once=once)
        else:
            _live(session, sample, every_s)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(int(ExitCode.INTERRUPTED)) from None


def _lines(
    session: Session, sample: Callable[[], Sequence[TopRow]], every_s: float, *, once: bool
) -> None:
    for line in _head():
        session.out.line(line)
    sys.stdout.flush()
    sample()
    while True:
        time.sleep(every_s)
        for row in sample():
            session.out.line(_text(row))
        sys.stdout.flush()
        if once:
            return


def _live(session: Session, sample: Callable[[], Sequence[TopRow]], every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(
        file=sys.stdout, no_color=not session.out.colored(sys.stdout), highlight=False, markup=False
    )

    def screen(rows: Sequence[TopRow]) -> Text:
        now = datetime.datetime.now().strftime("%H:%M:%S")
        title = f"stackctl top · {session.scope} · {now} · every {every_s:g} s · Ctrl-C ends"
        lines = [title, "", *_head(), *(_text(row) for row in rows)]
        if any(row.estimated for row in rows):
            lines += ["", "~ estimate: the engine does not report it"]
        room = console.height
        if len(lines) > room:
            hidden = len(lines) - room + 1
            lines = [*lines[: room - 1], f"... {hidden} more lines"]
        return Text("\n".join(lines), no_wrap=True, overflow="crop")

    with Live(screen(sample()), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(screen(sample()), refresh=True)


def _head() -> tuple[str, str]:
    names = " ".join(f"{name:>{width}}" for name, _, width in _COLUMNS)
    units = " ".join(f"{unit:>{width}}" for _, unit, width in _COLUMNS)
    return f"{'STACK':<{_STACK_WIDTH}} {names}".rstrip(), f"{'':<{_STACK_WIDTH}} {units}".rstrip()


def _text(row: TopRow) -> str:
    """Return the line of one stack, at most 79 columns."""
    name = truncate(row.stack, _STACK_WIDTH)
    if row.note is not None:
        used = f", {row.cpu:.1f} cores" if row.cpu is not None else ""
        return sanitize_terminal(f"{name:<{_STACK_WIDTH}}  {row.note}{used}")[:79]

    def about(field: str, text: str) -> str:
        return f"~{text}" if field in row.estimated and text != "-" else text

    cells = (
        _number(row.in_tok_s),
        _number(row.out_tok_s),
        "-" if row.running is None else str(row.running),
        "-" if row.waiting is None else str(row.waiting),
        about("kv_usage", _share(row.kv)),
        _share(row.hits),
        about("ttft_s", _seconds(row.ttft_s)),
        about("itl_s", _seconds(row.itl_s)),
        _number(row.cpu),
        _share(row.gpu),
    )
    texts = (f"{cell:>{width}}" for cell, (*_, width) in zip(cells, _COLUMNS, strict=True))
    return f"{name:<{_STACK_WIDTH}} {' '.join(texts)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f}%"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.9995:
        return f"{value * 1000:.0f}ms"
    return f"{value:.1f}s" if value < 10 else f"{value:.0f}s"
