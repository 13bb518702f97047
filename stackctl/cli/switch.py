"""``stackctl switch``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, start_options
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.deploy.new_generation import UpOptions


@stackctl_command("switch")
@click.argument("to", metavar="OBJECTIVE|PROFILE")
@click.option("--stack", metavar="STACK", help="The stack; needed when there are several.")
@start_options(plans=True)
def command(
    session: Session,
    to: str,
    stack: str | None,
    options: UpOptions,
    auto_fit: bool,
) -> None:
    """Switch a running stack to another OBJECTIVE (latency, throughput) or PROFILE.

    PROFILE must be a profile of that stack. The model and settings given to "up" stay. If anything
    fails, the previous generation is restored.
    """
    from stackctl.cli.up import show
    from stackctl.deploy.switch import stack_of, switch

    context = session.context(recover="no" if options.dry_run else "must")
    profiles = session.profiles()
    name = pick_stack(context, stack or stack_of(context, to, profiles))
    options = dataclasses.replace(options, profiles=profiles)
    show(session, context, switch(context, name, to, profiles, options, auto_fit=auto_fit))
