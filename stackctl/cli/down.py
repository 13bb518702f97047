"""``stackctl down``."""

from __future__ import annotations

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command


@stackctl_command("down")
@stack_argument
@click.option("--dry-run", is_flag=True, help="Show what would be stopped, change nothing.")
def command(session: Session, stack: str | None, dry_run: bool) -> None:
    """Stop STACK and remove its units. The model and the image stay.

    --json prints the status of the stacks that are still up, or would be.
    """
    from stackctl.deploy.lifecycle import down
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.deploy.unit_files import installed_stacks
    from stackctl.observe.status import status_report

    # An interrupted change that cannot be recovered must not prevent the removal of its stack.
    context = session.context(recover="no")
    name = pick_stack(context, stack)
    if dry_run:
        units = installed_generation(context, name).units
        text = f"would stop {units.service} and remove {context.paths.unit_folder(name)}"
        if session.out.json:
            session.out.note(text)
            others = (stack for stack in installed_stacks(context) if stack != name)
            session.out.data(status_report(context, tuple(others)))
        else:
            session.out.line(text)
        return
    session.out.progress("stop", name)
    down(context, name)
    if session.out.json:
        session.out.data(status_report(context, installed_stacks(context)))
    else:
        session.out.line(f"{name} is down")
