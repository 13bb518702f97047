"""``stackctl switch``."""

from __future__ import annotations

import click

from stackctl.cli.options import (
    drain_option,
    fit_option,
    rollout_timeouts,
    soak_option,
    timeout_option,
    yes_option,
)
from stackctl.cli.session import Session, stackctl_command
from stackctl.cli.stack_argument import pick_stack


@stackctl_command("switch")
@click.argument("to", metavar="OBJECTIVE|PROFILE")
@click.option("--stack", metavar="STACK", help="The stack; needed when there are several.")
@yes_option
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@click.option("--force", is_flag=True, help="Start even if the plan does not fit.")
@fit_option
@drain_option
@soak_option
@timeout_option("How long the start may take; default: from the model's size.")
def command(
    session: Session,
    to: str,
    stack: str | None,
    dry_run: bool,
    force: bool,
    auto_fit: bool,
    drain: float | None,
    soak: float | None,
    timeout: float | None,
) -> None:
    """Switch a running stack to another OBJECTIVE (latency, throughput) or PROFILE.

    PROFILE must be a profile of that stack. The model and settings given to "up" stay. If anything
    fails, the previous generation is restored.
    """
    from stackctl.cli.up import show
    from stackctl.deploy.new_generation import UpOptions
    from stackctl.deploy.switch import stack_of, switch

    context = session.context(recover="no" if dry_run else "must")
    profiles = session.profiles()
    name = pick_stack(context, stack or stack_of(context, to, profiles))
    options = UpOptions(
        deadline_s=timeout,
        force=force,
        dry_run=dry_run,
        timeouts=rollout_timeouts(drain, soak),
        profiles=profiles,
    )
    show(session, context, switch(context, name, to, profiles, options, auto_fit=auto_fit))
