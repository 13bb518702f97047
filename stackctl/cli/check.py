"""``stackctl check``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, pick_stack, stack_argument, timeout_option, verb
from stackctl.errors import ExitCode


@verb("check")
@stack_argument
@timeout_option("How long the answer may take; default 2m.")
def command(session: Session, stack: str | None, timeout: float | None) -> None:
    """Check STACK: its unit, its endpoint, the model it lists, and one real completion.

    Exits 1 when anything is wrong, 3 when it is stopped.
    """
    from stackctl.observe.status import check

    context = session.context()
    report = check(context, pick_stack(context, stack), answer_timeout_s=timeout or 120)
    if session.out.json:
        session.out.data(report)
    else:
        session.out.results(report.results)
    failed = [result for result in report.results if result.status == "fail"]
    if failed:
        stopped = failed[0].name == "unit" and failed[0].actual == "inactive"
        raise click.exceptions.Exit(int(ExitCode.NOT_RUNNING if stopped else ExitCode.FAILED))
