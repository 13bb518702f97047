"""``stackctl rollback``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_and_numbers, start_options
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.deploy.new_generation import UpOptions


@stackctl_command("rollback")
@click.argument("words", metavar="[STACK] [N]", nargs=-1)
@start_options(plans=False)
def command(
    session: Session,
    words: tuple[str, ...],
    options: UpOptions,
) -> None:
    """Go back to generation N of STACK; default: the last earlier one that was ready.

    Its stored unit is installed again, as a new generation. Nothing is planned again.
    """
    from stackctl.cli.up import show
    from stackctl.deploy.switch import rollback

    context = session.context(recover="no" if options.dry_run else "must")
    stack, numbers = stack_and_numbers(words, 1)
    number = numbers[0] if numbers else None
    show(session, context, rollback(context, pick_stack(context, stack), number, options))
