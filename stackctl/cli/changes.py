"""The commands that change a running stack: up, switch, restart, rollback, recover, down."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import (
    drain_option,
    pick_stack,
    plan_options,
    profile_names,
    rollout_timeouts,
    stack_and_numbers,
    stack_argument,
    start_options,
)
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.deploy.lifecycle import UpResult
    from stackctl.deploy.new_generation import UpOptions
    from stackctl.values.profile import Overrides, Profile


@stackctl_command("up")
@click.argument("profile", required=False, shell_complete=profile_names)
@plan_options
@start_options(plans=True)
def up(
    session: Session, profile: str | None, asked: Overrides, options: UpOptions, auto_fit: bool
) -> None:
    """Plan PROFILE, install its unit, start it, and check that it answers.

    A hub model that is not on this machine is downloaded first, also that of a shipped profile.
    Without PROFILE the command names the best profile for this machine and the reasons; on a
    terminal it asks whether to start it, otherwise (and with --yes) it exits 2.

    A running stack is replaced: the command shows the changes and asks, and with a front door,
    requests wait meanwhile. If anything fails, the previous state is restored.
    """
    import msgspec

    from stackctl.deploy import lifecycle
    from stackctl.deploy.model_download import ensure_model

    name = _best_profile(session, asked) if profile is None else profile
    context = session.context(recover="no" if options.dry_run else "must")
    profiles = session.profiles()

    def fit(sets: tuple[str, ...]) -> tuple[Profile, Overrides]:
        wanted = msgspec.structs.replace(asked, sets=(*asked.sets, *sets))
        return profiles.resolve(name, wanted), wanted

    options = dataclasses.replace(
        options, asked=asked, fit=fit if auto_fit else None, profiles=profiles
    )
    resolved = profiles.resolve(name, asked)
    ensure_model(context, resolved, options)
    _show_start(session, context, lifecycle.up(context, resolved, options))


def _best_profile(session: Session, asked: Overrides) -> str:
    """Return the best profile for this machine, if the user agrees to start it.

    --yes does not agree: a script that has lost its argument must not start another model.

    Raises:
        StackctlError: exit 2 with the profile and its reasons if the user cannot be asked; exit 1
            if the user declines.
    """
    from stackctl.deploy.profile_overview import profile_overview, reasons

    if asked.model is not None:
        hint = "stackctl profiles lists them; for a hub's model: stackctl model show SOURCE"
        raise StackctlError("missing PROFILE", hint=hint, exit_code=ExitCode.USAGE)
    found = profile_overview(session.plan_basis(), session.profiles())
    best = next((one for one in found.profiles if one.recommended), None)
    if best is None:
        raise StackctlError(
            "missing PROFILE: none is known to suit this machine",
            hint="stackctl plan PROFILE shows why\n"
            "another model: stackctl up PROFILE --model SOURCE",
            exit_code=ExitCode.USAGE,
        )
    if session.yes or session.out.json or not sys.stdin.isatty():
        raise StackctlError(
            f"missing PROFILE: the best for this machine is {best.name}",
            details=reasons(best),
            hint=f"stackctl up {best.name}; stackctl profiles lists the others",
            exit_code=ExitCode.USAGE,
        )
    session.out.note(f"the best profile for this machine is {best.name}")
    for line in reasons(best):
        session.out.note(f"  {line}")
    if not session.confirm(f"stackctl up {best.name}"):
        raise StackctlError("nothing was started")
    return best.name


@stackctl_command("switch")
@click.argument("to", metavar="OBJECTIVE|PROFILE")
@click.option("--stack", metavar="STACK", help="The stack; needed when there are several.")
@start_options(plans=True)
def switch(
    session: Session, to: str, stack: str | None, options: UpOptions, auto_fit: bool
) -> None:
    """Switch a running stack to another OBJECTIVE (latency, throughput) or PROFILE.

    PROFILE must be a profile of that stack. The model and settings given to "up" stay. If anything
    fails, the previous generation is restored.
    """
    from stackctl.deploy import switch as switches

    context = session.context(recover="no" if options.dry_run else "must")
    profiles = session.profiles()
    name = pick_stack(context, stack or switches.stack_of(context, to, profiles))
    options = dataclasses.replace(options, profiles=profiles)
    done = switches.switch(context, name, to, profiles, options, auto_fit=auto_fit)
    _show_start(session, context, done)


@stackctl_command("rollback")
@click.argument("words", metavar="[STACK] [N]", nargs=-1)
@start_options(plans=False)
def rollback(session: Session, words: tuple[str, ...], options: UpOptions) -> None:
    """Go back to generation N of STACK; default: the last earlier one that was ready.

    Its stored unit is installed again, as a new generation. Nothing is planned again.
    """
    from stackctl.deploy import switch as switches

    context = session.context(recover="no" if options.dry_run else "must")
    stack, numbers = stack_and_numbers(words, 1)
    number = numbers[0] if numbers else None
    done = switches.rollback(context, pick_stack(context, stack), number, options)
    _show_start(session, context, done)


def _show_start(session: Session, context: Context, done: UpResult) -> None:
    """Print the result of ``up``, ``switch`` or ``rollback``, and the next commands."""
    from stackctl.deploy import guard_timer
    from stackctl.observe.status import stack_url, status_report

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
        out.data(status_report(context, (stack,)))
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


@stackctl_command("restart")
@stack_argument
@drain_option
def restart(session: Session, stack: str | None, drain: float | None) -> None:
    """Restart STACK as it is installed, and wait until it answers.

    With a front door, running requests end first, and new requests wait.
    """
    from stackctl.deploy import lifecycle
    from stackctl.observe.status import status_report

    context = session.context()
    generation = lifecycle.restart(context, pick_stack(context, stack), rollout_timeouts(drain))
    if session.out.json:
        session.out.data(status_report(context, (generation.stack,)))
        return
    session.out.line(f"{generation.stack} is up (generation {generation.number}, restarted)")


@stackctl_command("recover")
def recover(session: Session) -> None:
    """Complete or revert a change that a crash, a kill or a power loss interrupted.

    Afterwards either the old or the new generation serves. Most commands that work with stacks do
    this first. --json prints the status of the stacks that are up.
    """
    from stackctl.deploy import transaction
    from stackctl.deploy.unit_files import installed_stacks
    from stackctl.observe.status import status_report

    context = session.context(recover="no")
    done = transaction.recover(context)
    if session.out.json:
        session.out.data(status_report(context, installed_stacks(context)))
        return
    if done is None:
        session.out.line("nothing to recover")
        return
    state = f"generation {done.winner}" if done.winner is not None else "down"
    session.out.line(f"{done.stack} is recovered: {state}")


@stackctl_command("down")
@stack_argument
@click.option("--dry-run", is_flag=True, help="Show what would be stopped, change nothing.")
def down(session: Session, stack: str | None, dry_run: bool) -> None:
    """Stop STACK and remove its units. The model and the image stay.

    --json prints the status of the stacks that are still up, or would be.
    """
    from stackctl.deploy import lifecycle
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
    lifecycle.down(context, name)
    if session.out.json:
        session.out.data(status_report(context, installed_stacks(context)))
    else:
        session.out.line(f"{name} is down")
