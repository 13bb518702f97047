"""``stackctl up``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from stackctl.cli.options import plan_options, profile_argument, start_options
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.deploy.lifecycle import UpResult
    from stackctl.deploy.new_generation import UpOptions
    from stackctl.values.profile import Overrides, Profile


@stackctl_command("up")
@profile_argument
@plan_options
@start_options(plans=True)
def command(
    session: Session,
    profile: str,
    asked: Overrides,
    options: UpOptions,
    auto_fit: bool,
) -> None:
    """Plan PROFILE, install its unit, start it, and check that it answers.

    A hub model that is not on this machine is downloaded first, also that of a shipped profile
    (stackctl profiles). A running stack is replaced: the
    command shows the changes and asks, and with a front door, requests wait meanwhile. If anything
    fails, the previous state is restored.
    """
    import msgspec

    from stackctl.deploy.lifecycle import up
    from stackctl.deploy.model_download import ensure_model

    context = session.context(recover="no" if options.dry_run else "must")
    profiles = session.profiles()

    def fit(sets: tuple[str, ...]) -> tuple[Profile, Overrides]:
        wanted = msgspec.structs.replace(asked, sets=(*asked.sets, *sets))
        return profiles.resolve(profile, wanted), wanted

    options = dataclasses.replace(
        options, asked=asked, fit=fit if auto_fit else None, profiles=profiles
    )
    resolved = profiles.resolve(profile, asked)
    ensure_model(context, resolved, options)
    show(session, context, up(context, resolved, options))


def show(session: Session, context: Context, done: UpResult) -> None:
    """Print the result of ``up``, ``switch`` or ``rollback``, and the next commands."""
    from stackctl.deploy import guard_timer
    from stackctl.observe.status import stack_report, stack_url

    out = session.out
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
        out.data(stack_report(context, stack))
        return
    number = done.generation.number
    if done.change == "unchanged":
        out.line(f"{stack} is up already, nothing to change (generation {number})")
    else:
        out.line(f"{stack} is up (generation {number})")
    out.line(f"  {stack_url(done.generation)}/v1   model {done.plan.served_name}")
    out.note(f"  check  stackctl check     log  stackctl logs -f     stop  stackctl down {stack}")
    if session.scope == "user" and done.generation.host.tools.linger is False:
        out.warn("it ends when you log out", "loginctl enable-linger $USER")
    # Only at the first start: a user without the guard has read the hint then.
    if done.change == "started" and number == 1 and not guard_timer.timer_installed(context):
        out.note("  guard  stackctl guard --install   has all stacks checked every minute")
