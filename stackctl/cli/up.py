"""``stackctl up``."""

from __future__ import annotations

import click

from stackctl.cli.planning import advised
from stackctl.cli.session import (
    Session,
    overrides,
    plan_options,
    profile_argument,
    timeout_option,
    verb,
    yes_option,
)


@verb("up")
@profile_argument
@plan_options
@yes_option
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
@click.option("--force", is_flag=True, help="Start even what does not fit.")
@timeout_option("How long the start may take; default: from the model's size.")
def command(
    session: Session,
    profile: str,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
    dry_run: bool,
    force: bool,
    timeout: float | None,
) -> None:
    """Plan PROFILE, install its unit, start it, and check that it answers.

    When anything fails, the machine is put back as it was.
    """
    from stackctl.deploy.transaction import Wish, up
    from stackctl.health.endpoint import base_url
    from stackctl.observe.status import one

    out, context = session.out, session.context()
    resolved = session.profiles().resolve(profile, overrides(sets, model, objective, name))
    wanted = Wish(deadline_s=timeout, force=force, dry_run=dry_run)
    done = up(context, resolved, wanted, lambda plan: advised(session, resolved, plan))
    if done.generation is None:
        if out.json:
            out.data(done.plan)
        else:
            for file in done.units.files:
                out.line(file.text.rstrip("\n"))
            out.note("dry run: checked, nothing was changed")
        return
    stack = done.generation.stack
    if out.json:
        out.data(one(context, stack))
        return
    number = done.generation.number
    if done.change == "unchanged":
        out.line(f"{stack} is up already, nothing to change (generation {number})")
    else:
        out.line(f"{stack} is up (generation {number})")
    out.line(f"  {base_url(done.plan.port)}/v1   model {done.plan.served_name}")
    out.note(f"  check  stackctl check     log  stackctl logs -f     stop  stackctl down {stack}")
    if session.scope == "user" and done.generation.host.tools.linger is False:
        out.warn("it ends when you log out", "loginctl enable-linger $USER")
