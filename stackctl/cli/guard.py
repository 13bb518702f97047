"""``stackctl guard``."""

from __future__ import annotations

import click

from stackctl.cli.options import duration_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.status import GuardResult


@stackctl_command("guard")
@duration_option("--timeout", "How long each answer may take; default 30s.")
@click.option("--install", is_flag=True, help="Install a timer that does this every minute.")
@click.option("--remove", is_flag=True, help="Remove the timer.")
def command(session: Session, timeout: float | None, install: bool, remove: bool) -> None:
    """Check all stacks once, record the results, and restart dead engines.

    Prints nothing when all is well, exits 1 when a stack is not. An engine is dead if in two checks
    in a row it neither answers nor works. Engines that answer late because they are busy, and
    stacks that are starting or being changed, are left alone.
    """
    from stackctl.deploy import guard_timer
    from stackctl.machine import runner
    from stackctl.observe.guard import guard_stacks

    context = session.context(recover="try")
    if install and remove:
        raise StackctlError("--install or --remove, not both", exit_code=ExitCode.USAGE)
    if install:
        for path in guard_timer.install_timer(context, runner.own_command()):
            session.out.note(f"unit      {path}")
        session.out.line("guarding all stacks, every minute")
        return
    if remove:
        gone = guard_timer.remove_timer(context)
        session.out.line("guarding no more" if gone else "there was no guard")
        return
    report = guard_stacks(context, answer_timeout_s=timeout or 30)
    wrong = [seen for seen in report.stacks if seen.health and seen.health.status == "fail"]
    if not session.out.wrote_json(report):
        for seen in wrong:
            session.out.line(_text(seen))
    if wrong:
        raise click.exceptions.Exit(int(ExitCode.FAILED))


def _text(seen: GuardResult) -> str:
    health = seen.health
    assert health is not None
    words = f"{seen.stack}   FAIL  {health.name}: {health.message or 'nothing to see'}"
    return f"{words}; restarted" if seen.action == "restarted" else words
