"""``stackctl rollback``."""

from __future__ import annotations

import click

from stackctl.cli.options import drain_option, rollout_timeouts, soak_option, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.cli.stack_argument import pick_stack, stack_and_numbers


@stackctl_command("rollback")
@click.argument("words", metavar="[STACK] [N]", nargs=-1)
@yes_option
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@click.option("--force", is_flag=True, help="Start even when memory is short.")
@drain_option
@soak_option
def command(
    session: Session,
    words: tuple[str, ...],
    dry_run: bool,
    force: bool,
    drain: float | None,
    soak: float | None,
) -> None:
    """Go back to generation N of STACK; default: the last earlier one that was ready.

    Its stored unit is installed again, as a new generation. Nothing is planned again.
    """
    from stackctl.cli.up import show
    from stackctl.deploy.new_generation import UpOptions
    from stackctl.deploy.switch import rollback

    context = session.context(recover="no" if dry_run else "must")
    stack, numbers = stack_and_numbers(words, 1)
    options = UpOptions(force=force, dry_run=dry_run, timeouts=rollout_timeouts(drain, soak))
    number = numbers[0] if numbers else None
    show(session, context, rollback(context, pick_stack(context, stack), number, options))
