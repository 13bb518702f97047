"""``stackctl verify``."""

from __future__ import annotations

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode


@stackctl_command("verify")
@stack_argument
def command(session: Session, stack: str | None) -> None:
    """Prove that STACK runs as planned, by data of kernel and engine, not of the unit.

    Mismatches come first, each with its cause and remedy. A property that cannot be read is
    skipped, never reported as ok. The engine answers a few short requests meanwhile. Exits 1 when
    anything is not as planned, 3 when the stack does not run.
    """
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.inspection import verify_stack

    context = session.context(recover="try")
    generation = installed_generation(context, pick_stack(context, stack))
    report = verify_stack(context, generation)
    if not session.out.wrote_json(report):
        session.out.results(report.results)
    if any(result.status == "fail" for result in report.results):
        raise click.exceptions.Exit(int(ExitCode.FAILED))
