"""``stackctl diagnose``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import current_slo, duration_option, pick_stack, stack_argument
from stackctl.cli.output import NO_BREAK, WIDTH
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stackctl.values.diagnosis import DiagnoseReport, Finding

_SINCE_S = 600.0
_COLUMN = 3
#: Words for causes that were ruled out.
_CLEARED = {
    "decode-bound": "generation",
    "prefill-bound": "prompts",
    "queueing": "queue",
    "kv-pressure": "KV cache and memory",
    "prefix-cache-misses": "prefix cache",
    "whole-file-edits": "answers",
    "context-oversized": "context",
    "oversubscribed-threads": "cores",
    "page-cache-misplacement": "memory nodes",
    "thermal-limit": "heat",
}


@stackctl_command("diagnose")
@stack_argument
@click.option("--log", metavar="FILE", help="Read an engine's log instead of a stack; - is stdin.")
@duration_option("--since", "Period to read; default: 10m of a stack, all of a log.")
def command(session: Session, stack: str | None, log: str | None, since: float | None) -> None:
    """Find why STACK is slow, rule out other causes, and list remedies in order.

    Reads the engine's log, its metrics twice while it works, the plan, and the kernel's data about
    its processes. With --log it reads only that log, on any machine. Causes that cannot be proven
    are not reported. Exits 0 whatever it finds, 3 when the stack does not run.
    """
    if log is not None and stack is not None:
        raise StackctlError("a stack or --log, not both", exit_code=ExitCode.USAGE)
    if since is not None and since <= 0:
        raise StackctlError("--since must be above 0", exit_code=ExitCode.USAGE)
    report = _of_log(log, since) if log is not None else _of_stack(session, stack, since)
    if not session.out.wrote_json(report):
        _show(session, report)


def _of_log(log: str, since_s: float | None) -> DiagnoseReport:
    from stackctl.diagnose.load_summary import last_seconds, read_log
    from stackctl.engines import ENGINES
    from stackctl.machine.files import read_lines
    from stackctl.observe.diagnose import diagnose_evidence
    from stackctl.values.diagnosis import Evidence

    samples = read_log(read_lines(log))
    if samples is None:
        raise StackctlError(
            f"no engine's log: {'stdin' if log == '-' else log}",
            hint="lines that it must have: "
            + ", ".join(f'{one.title} "{one.advice.log_mark}"' for one in ENGINES.values()),
            exit_code=ExitCode.USAGE,
        )
    if since_s is not None:
        samples = last_seconds(samples, since_s)
    return diagnose_evidence(Evidence(log=samples), source=log)


def _of_stack(session: Session, stack: str | None, since_s: float | None) -> DiagnoseReport:
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.diagnose import collect_evidence, diagnose_evidence

    context = session.context(recover="try")
    generation = installed_generation(context, pick_stack(context, stack))
    slo = current_slo(session, generation)
    since_s = _SINCE_S if since_s is None else since_s
    return diagnose_evidence(collect_evidence(context, generation, slo=slo, since_s=since_s))


def _show(session: Session, report: DiagnoseReport) -> None:
    out = session.out
    wrong = [found for found in report.results if found.status in ("fail", "warn")]
    cleared = [found for found in report.results if found.status == "ok"]
    if not wrong:
        seen = report.windows + report.requests
        nothing = "nothing is wrong" if cleared else "nothing to tell: no request was seen"
        out.line(f"{nothing}" if seen or cleared else "nothing to tell: no request was seen")
        _cleared(session, cleared)
    for number, found in enumerate(wrong, 1):
        _finding(session, number, found, cleared if number == 1 else ())
    for found in report.results:
        if found.status == "info":
            _wrapped(session, found.actual or "", label="note", column=6, color="cyan")


def _finding(session: Session, number: int, found: Finding, cleared: Sequence[Finding]) -> None:
    color = "red" if found.status == "fail" else "yellow"
    _wrapped(session, found.actual or "", label=f"{number}", color=color)
    if found.evidence:
        sure = f" (confidence {found.confidence})" if found.confidence != "high" else ""
        _wrapped(session, f"seen: {found.evidence}{sure}")
    _cleared(session, cleared)
    if found.steps:
        many = len(found.steps) > 1
        _wrapped(session, f"do{', in this order' if many else ''}")
        width = max((len(step.do) for step in found.steps if step.command), default=0)
        for step in found.steps:
            _step(session, step.do, step.command, min(width, 44))
    if found.effect:
        _wrapped(session, f"effect: {found.effect}")


def _step(session: Session, do: str, command: str | None, width: int) -> None:
    """Print a step with its command beside it, or below it if both do not fit on a line."""
    column = _COLUMN + 2
    if command is None:
        _wrapped(session, do, column=column)
    elif len(do) <= width and column + width + 2 + len(command) <= WIDTH:
        session.out.line(f"{'':<{column}}{do:<{width}}  {command}")
    else:
        _wrapped(session, do, column=column)
        # A command is never wrapped, so that it can be pasted.
        session.out.line(f"{'':<{column}}  {command}")


def _cleared(session: Session, cleared: Sequence[Finding]) -> None:
    if cleared:
        texts = (f"{_CLEARED.get(found.name, found.name)} ({found.actual})" for found in cleared)
        _wrapped(session, "cleared: " + ", ".join(texts))


def _wrapped(
    session: Session, text: str, *, label: str = "", column: int = _COLUMN, color: str | None = None
) -> None:
    """Print a label and, from ``column`` on, a text whose numbers stay with their units."""
    glued = re.sub(r"(?<=\d) (?=%|tok/s|s\b|MHz|GiB|waiting|request)", NO_BREAK, text)
    session.out.labelled(label, glued, column=column, color=color)
