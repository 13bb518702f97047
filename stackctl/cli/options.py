"""Options and arguments that several commands take, and the stack that a command is about."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackctl.cli.session import Session, add_options, make_session
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.deploy.transaction import RolloutTimeouts
    from stackctl.values.generation import Generation
    from stackctl.values.profile import Slo

Command = Callable[..., None]
#: Types of paths that exist.
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
#: The number of a generation in a command line.
_NUMBER = re.compile("[0-9]{1,9}")


def profile_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    """Return the profiles whose names begin so, for the completion of a shell."""
    session = make_session({}, profile_folder=context.params.get("profile_folder"))
    return [name for name in session.profiles().names() if name.startswith(incomplete)]


def _stack_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    from stackctl.state.generations import Generations

    paths = make_session({"scope": context.params.get("scope")}).paths()
    found = {path.name for path in paths.units.iterdir()} if paths.units.is_dir() else set()
    found |= set(Generations(paths.state).stacks())
    return sorted(name for name in found if name.startswith(incomplete))


def _duration(_: Any, __: Any, value: str | None) -> float | None:
    from stackctl.quantity import parse_duration

    return None if value is None else parse_duration(value)


def duration_option(name: str, help_text: str) -> Callable[[Command], Command]:
    """Return an option with a duration such as 90s or 10m; the function gets seconds or None."""
    return click.option(name, metavar="DURATION", callback=_duration, help=help_text)


stack_argument = click.argument("stack", required=False, shell_complete=_stack_names)
profile_argument = click.argument("profile", shell_complete=profile_names)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
facts_option = click.option(
    "--facts",
    type=FILE,
    help="Plan for the machine in this file (stackctl probe --json), not for this one.",
)
folder_option = click.option(
    "--profiles", "profile_folder", type=FOLDER, help="Search this folder of profiles first."
)
drain_option = duration_option(
    "--drain", "How long running requests may take to end (60s); 0s cuts them off."
)
_PLAN = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a key of the profile, e.g. context=4096; may be repeated.",
    ),
    click.option("--model", metavar="SOURCE", help="The model, e.g. file:/srv/models/m.gguf."),
    click.option(
        "--objective",
        type=click.Choice(["latency", "throughput"]),
        help="Objective to plan for; default: the profile's.",
    ),
    click.option("--name", metavar="NAME", help="Name of the stack; the profile has a default."),
    folder_option,
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
_SOAK = duration_option(
    "--soak", "How long the new engine is watched before the old one is given up (5s)."
)
#: Options of a start with a new plan, and with a stored one.
_START_NEW = (
    yes_option,
    _DRY_RUN,
    click.option("--force", is_flag=True, help="Start even if the plan does not fit."),
    click.option(
        "--auto-fit",
        is_flag=True,
        help="If the engine reports a size that would fit, start once more with it.",
    ),
    drain_option,
    _SOAK,
    duration_option("--timeout", "How long the start may take; default: from the model's size."),
)
_START_STORED = (
    yes_option,
    _DRY_RUN,
    click.option("--force", is_flag=True, help="Start even when memory is short."),
    drain_option,
    _SOAK,
)


def plan_options(function: Command) -> Command:
    """Add the options of all commands that plan; the function gets them as ``asked``: Overrides."""

    @functools.wraps(function)
    def call(
        session: Session, *, sets: Any, model: Any, objective: Any, name: Any, **others: Any
    ) -> None:
        from stackctl.values.profile import Overrides

        asked = Overrides(sets=sets, model=model, objective=objective, name=name)
        function(session, asked=asked, **others)

    return add_options(call, _PLAN)


def start_options(*, plans: bool) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of commands that start an engine.

    The function gets them as ``options``: UpOptions. With ``plans`` there are those for a new plan
    too, and the function gets ``auto_fit``.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def call(
            session: Session, *, dry_run: Any, force: Any, drain: Any, soak: Any,
            timeout: float | None = None, **others: Any,
        ) -> None:  # fmt: skip
            from stackctl.deploy.new_generation import UpOptions

            timeouts = rollout_timeouts(drain, soak)
            options = UpOptions(timeout, force=force, dry_run=dry_run, timeouts=timeouts)
            function(session, options=options, **others)

        return add_options(call, _START_NEW if plans else _START_STORED)

    return decorate


def rollout_timeouts(drain: float | None, soak: float | None = None) -> RolloutTimeouts:
    """Return the patience from --drain and --soak, in seconds; None stands for the default."""
    from stackctl.deploy.transaction import RolloutTimeouts

    given = {"drain_s": drain, "soak_s": soak}
    return RolloutTimeouts(**{key: value for key, value in given.items() if value is not None})


def pick_stack(context: Context, name: str | None, *, past: bool = False) -> str:
    """Return the stack with that name or with a profile of that name; None: the only stack.

    A stack with that name may be down if it was ever up. With ``past`` the only stack may be down
    too, if no other stack is up.

    Raises:
        StackctlError: exit 3 if no stack is up, 4 if none has that name, 2 if there are several
            and ``name`` is None.
    """
    from stackctl.deploy import unit_files
    from stackctl.units.render import profile_of

    up = unit_files.installed_stacks(context)
    known = tuple(dict.fromkeys((*up, *context.generations.stacks())))
    if name is None:
        found = up or (known if past else ())
        if len(found) == 1:
            return found[0]
        if not found:
            raise StackctlError(
                "no stack is up", hint="stackctl up PROFILE", exit_code=ExitCode.NOT_RUNNING
            )
        raise StackctlError(
            "missing STACK: several stacks are up", hint=", ".join(found), exit_code=ExitCode.USAGE
        )
    if name in known:
        return name
    for stack in up:
        file = unit_files.engine_file(stack, unit_files.installed(context, stack))
        if file is not None and profile_of(file.text) == name:
            return stack
    raise StackctlError(
        f"no stack named {name}",
        hint="stacks: " + (", ".join(known) or "none is up"),
        exit_code=ExitCode.NOT_FOUND,
    )


def running_stack(context: Context, name: str | None) -> str:
    """Return the stack as ``pick_stack`` does. Raise StackctlError (exit 3) if it is not up."""
    from stackctl.deploy import stack_state, unit_files

    stack = pick_stack(context, name)
    if stack not in unit_files.installed_stacks(context):
        raise stack_state.not_running(stack)
    return stack


def current_slo(session: Session, generation: Generation) -> Slo | None:
    """Return the SLO in the present file of a generation's profile, which may have changed.

    If the profile is missing or not valid, return the SLO that was stored with the generation.
    """
    try:
        return session.profiles().resolve(generation.plan.profile, generation.asked).slo
    except StackctlError:
        return generation.profile.slo if generation.profile else None


def stack_and_numbers(words: Sequence[str], most: int) -> tuple[str | None, tuple[int, ...]]:
    """Return the stack and the generations of ``[STACK] [N]...``; None if no stack is named.

    Raises StackctlError (exit 2) if there are two stacks or more than ``most`` generations.
    """
    names = [word for word in words if not _NUMBER.fullmatch(word)]
    numbers = tuple(int(word) for word in words if _NUMBER.fullmatch(word))
    if len(names) > 1 or len(numbers) > most or (names and words[0] != names[0]):
        raise StackctlError(
            f"unexpected arguments: {' '.join(words)}",
            hint="the stack first, then " + ("a generation" if most == 1 else "two generations"),
            exit_code=ExitCode.USAGE,
        )
    return (names[0] if names else None), numbers
