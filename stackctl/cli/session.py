"""The parts that all commands share: global options, the session, and arguments of stacks."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.change import Patience
    from stackctl.deploy.context import Context
    from stackctl.deploy.plan_inputs import PlanBasis
    from stackctl.sources.profiles import Profiles
    from stackctl.state.paths import Paths
    from stackctl.values.generation import Generation
    from stackctl.values.profile import Slo


@dataclass(frozen=True)
class Session:
    """One run of a command.

    ``host`` is the box of the stack, None for this machine. ``host_scope`` is the option for the
    scope there, --user or --system; empty if neither was given.
    """

    out: Output
    scope: Literal["user", "system"]
    yes: bool = False
    profile_folder: Path | None = None
    host: str | None = None
    host_scope: tuple[str, ...] = ()

    def paths(self) -> Paths:
        """Return the folders of the scope."""
        from stackctl.machine.runner import controlled_environment
        from stackctl.state.paths import paths

        return paths(self.scope, controlled_environment(), profile_folder=self.profile_folder)

    def profiles(self) -> Profiles:
        """Return the profiles that this session can use."""
        from stackctl.sources.profiles import Profiles
        from stackctl.state.paths import paths

        # The caller's own folder, also under sudo -E: it is refused there, not ignored.
        found = paths(self.scope, os.environ, profile_folder=self.profile_folder)
        return Profiles(found.profiles, chosen=self.profile_folder)

    def plan_basis(self, facts: Path | None = None) -> PlanBasis:
        """Return the machine to plan for: this one, or the one in a file of facts."""
        from stackctl.deploy.plan_inputs import read_basis, read_basis_file
        from stackctl.machine.files import LiveMachine

        if facts is not None:
            return read_basis_file(self.paths(), LiveMachine(), facts)
        return read_basis(self.paths(), LiveMachine())

    def context(self, *, recover: Literal["must", "try", "no"] = "must") -> Context:
        """Return the context of deployments, and first recover an interrupted change.

        Args:
            recover: "must" raises if the recovery fails, "try" only warns, for commands that show
                the state, and "no" does not recover.

        Raises:
            StackctlError: exit 2 for --system without root; folders that others can write.
        """
        from stackctl.deploy.context import Context
        from stackctl.machine import trust
        from stackctl.machine.files import LiveMachine
        from stackctl.machine.systemd import Systemd

        paths = self.paths()
        if self.scope == "system" and os.geteuid() != 0:
            raise StackctlError(
                "--system needs root",
                hint="sudo stackctl ..., or leave --system out for a user service",
                exit_code=ExitCode.USAGE,
            )
        for folder in (paths.units, paths.state, paths.cache, paths.runtime):
            trust.require_root_only(folder, "folder")
        for folder in (paths.state, paths.cache, paths.compiles, paths.runtime):
            trust.close(folder)
        context = Context(
            paths=paths,
            machine=LiveMachine(),
            systemd=Systemd(self.scope),
            report=self.out,
            confirm=self.confirm,
        )
        if recover != "no" and context.journal.open:
            from stackctl.deploy.recover import recover_quietly

            recover_quietly(context, must=recover == "must")
        return context

    def confirm(self, question: str) -> bool:
        """Return True if --yes is given or the user agrees.

        Raises StackctlError (exit 2) if there is no terminal to ask on.
        """
        if self.yes:
            return True
        if not sys.stdin.isatty():
            raise StackctlError(
                question, hint="--yes goes on without asking", exit_code=ExitCode.USAGE
            )
        from stackctl.machine import lock

        # Another stackctl that finds the lock taken waits for the user's answer.
        with lock.waiting(self.paths().lock):
            return click.confirm(f"{question}: go on?", err=True)


_GLOBAL: tuple[Callable[[Any], Any], ...] = (
    click.option("--user", "scope", flag_value="user", help="Units of this user; the default."),
    click.option(
        "--system", "scope", flag_value="system", help="Units of the system; root's default."
    ),
    click.option(
        "--host",
        metavar="USER@BOX",
        help="Run the command on that machine, over ssh, with its stackctl.",
    ),
    click.option("--json", is_flag=True, help="Print a JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Show the commands that are run."),
    click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), help="When to use colour."
    ),
    click.option("--no-progress", is_flag=True, help="No live progress line."),
)
_GLOBAL_NAMES = ("scope", "host", "json", "quiet", "verbose", "color", "no_progress")


def global_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the global options; they may stand before the verb and after it."""
    for option in reversed(_GLOBAL):
        command = option(command)
    return command


def verb(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a command of a function.

    The command has the global options, and its function gets a Session as the first argument.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        def call(**parameters: Any) -> None:
            context = click.get_current_context()
            given = {key: parameters.pop(key) for key in _GLOBAL_NAMES}
            before = context.find_root().params
            for key in _GLOBAL_NAMES:
                given[key] = given[key] or before.get(key)
            session = make_session(
                given,
                yes=bool(parameters.pop("yes", False)),
                profile_folder=parameters.pop("profile_folder", None),
            )
            context.find_root().meta["stackctl.output"] = session.out
            function(session, **parameters)

        call.__doc__ = function.__doc__
        made = click.command(name)(call)
        own = reversed(getattr(function, "__click_params__", []))
        shared = reversed(getattr(global_options(lambda: None), "__click_params__", []))
        # A verb's own options come first in its help.
        made.params = [*own, *shared]
        return made

    return decorate


def make_session(
    given: dict[str, Any], *, yes: bool = False, profile_folder: Path | None = None
) -> Session:
    """Return a session from the values of the global options."""
    out = Output(
        json=bool(given["json"]),
        quiet=bool(given["quiet"]),
        verbose=bool(given["verbose"]),
        color=given["color"] or "auto",
        progress=not given["no_progress"],
    )
    if out.verbose:
        from stackctl.machine import runner

        runner.observer = lambda command: out.note(f"$ {command}")
    scope: Literal["user", "system"] = given["scope"] or ("system" if os.geteuid() == 0 else "user")
    asked = (f"--{given['scope']}",) if given["scope"] else ()
    return Session(out, scope, yes, profile_folder, given["host"], asked)


def _profile_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    folder = context.params.get("profile_folder")
    session = make_session(dict.fromkeys(_GLOBAL_NAMES), profile_folder=folder)
    return [name for name in session.profiles().names() if name.startswith(incomplete)]


def _stack_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    scope = context.params.get("scope")
    session = make_session({**dict.fromkeys(_GLOBAL_NAMES), "scope": scope})
    from stackctl.state.generations import Generations

    paths = session.paths()
    found = {path.name for path in paths.units.iterdir()} if paths.units.is_dir() else set()
    found |= set(Generations(paths.state).stacks())
    return sorted(name for name in found if name.startswith(incomplete))


profile_argument = click.argument("profile", shell_complete=_profile_names)
stack_argument = click.argument("stack", required=False, shell_complete=_stack_names)

_PLAN = (
    click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set a key of the profile."
    ),
    click.option("--model", metavar="SOURCE", help="The model, e.g. file:/srv/models/m.gguf."),
    click.option(
        "--objective",
        type=click.Choice(["latency", "throughput"]),
        help="Objective to plan for; default: the profile's.",
    ),
    click.option("--name", metavar="NAME", help="Name of the stack; the profile has a default."),
    click.option(
        "--profiles",
        "profile_folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Search this folder of profiles first.",
    ),
)


def plan_options(command: Any) -> Any:
    """Add the options of all commands that plan."""
    for option in reversed(_PLAN):
        command = option(command)
    return command


def overrides(
    sets: tuple[str, ...], model: str | None, objective: str | None, name: str | None
) -> Any:
    """Return the overrides of a profile from the options of a planning command."""
    from stackctl.values.profile import Overrides

    return Overrides(sets=sets, model=model, objective=objective, name=name)


def duration(_: Any, __: Any, value: str | None) -> float | None:
    """Parse the value of an option, such as 90s or 10m, into seconds; None if it is not given."""
    from stackctl.quantity import parse_duration

    return None if value is None else parse_duration(value)


def timeout_option(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option --timeout, with a duration such as 90s or 10m."""
    return click.option("--timeout", metavar="DURATION", callback=duration, help=help_text)


fit_option = click.option(
    "--auto-fit",
    is_flag=True,
    help="If the engine reports a size that would fit, start once more with it.",
)
drain_option = click.option(
    "--drain",
    metavar="DURATION",
    callback=duration,
    help="How long running requests may take to end (60s); 0s cuts them off.",
)
soak_option = click.option(
    "--soak",
    metavar="DURATION",
    callback=duration,
    help="How long the new engine is watched before the old one is given up (5s).",
)


def patience(drain: float | None, soak: float | None) -> Patience:
    """Return the patience from --drain and --soak, in seconds; None stands for the default."""
    from stackctl.deploy.change import Patience

    usual = Patience()
    return Patience(
        drain_s=usual.drain_s if drain is None else drain,
        soak_s=usual.soak_s if soak is None else soak,
    )


#: The number of a generation in a command line.
_NUMBER = re.compile("[0-9]{1,9}")

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def pick_stack(context: Context, name: str | None, *, past: bool = False) -> str:
    """Return the stack with that name or with a profile of that name; None: the only stack.

    A stack with that name may be down if it was ever up. With ``past`` the only stack may be down
    too, if no other stack is up.

    Raises:
        StackctlError: exit 3 if no stack is up, 4 if none has that name, 2 if there are several
            and ``name`` is None.
    """
    from stackctl.deploy import install
    from stackctl.units.render import profile_of

    up = install.installed_stacks(context)
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
        file = install.engine_file(stack, install.installed(context, stack))
        if file is not None and profile_of(file.text) == name:
            return stack
    raise StackctlError(
        f"no stack named {name}",
        hint="stacks: " + (", ".join(known) or "none is up"),
        exit_code=ExitCode.NOT_FOUND,
    )


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
