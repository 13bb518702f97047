"""The parts that all commands share: global options, the session, and arguments of stacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.deploy.planning import PlanBasis
    from stackctl.sources.profiles import Profiles
    from stackctl.state.paths import Paths


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
        from stackctl.state.paths import scope_paths

        return scope_paths(self.scope, controlled_environment(), profile_folder=self.profile_folder)

    def profiles(self) -> Profiles:
        """Return the profiles that this session can use."""
        from stackctl.sources.profiles import Profiles
        from stackctl.state.paths import scope_paths

        # The caller's own folder, also under sudo -E: it is refused there, not ignored.
        found = scope_paths(self.scope, os.environ, profile_folder=self.profile_folder)
        return Profiles(found.profiles, chosen=self.profile_folder)

    def plan_basis(self, facts: Path | None = None) -> PlanBasis:
        """Return the machine to plan for: this one, or the one in a file of facts."""
        from stackctl.deploy.planning import read_basis, read_basis_file
        from stackctl.machine.machine import Machine

        if facts is not None:
            return read_basis_file(self.paths(), Machine(), facts)
        return read_basis(self.paths(), Machine())

    def context(self, *, recover: Literal["must", "try", "no"] = "must") -> Context:
        """Return the context of deployments, and first recover an interrupted change.

        Args:
            recover: "must" raises if the recovery fails, "try" only warns, for commands that show
                the state, and "no" does not recover.

        Raises:
            StackctlError: exit 2 for --system without root; folders that others can write.
        """
        from stackctl.deploy.context import Context
        from stackctl.machine import path_security
        from stackctl.machine.machine import Machine
        from stackctl.machine.systemd import Systemd

        paths = self.paths()
        if self.scope == "system" and os.geteuid() != 0:
            raise StackctlError(
                "--system needs root",
                hint="sudo stackctl ..., or leave --system out for a user service",
                exit_code=ExitCode.USAGE,
            )
        for folder in (paths.units, paths.state, paths.cache, paths.runtime):
            path_security.require_root_only(folder, "folder")
        for folder in (paths.state, paths.cache, paths.compile_caches, paths.runtime):
            path_security.restrict_permissions(folder)
        context = Context(
            paths=paths,
            machine=Machine(),
            systemd=Systemd(self.scope),
            progress=self.out,
            confirm=self.confirm,
        )
        if recover != "no" and context.journal.is_open:
            from stackctl.deploy.transaction import recover_quietly

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
        with lock.mark_waiting(self.paths().lock):
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
GLOBAL_NAMES = ("scope", "host", "json", "quiet", "verbose", "color", "no_progress")


def add_options(
    function: Callable[..., Any], options: Sequence[Callable[[Any], Any]]
) -> Callable[..., Any]:
    """Add options of click to a function, in the order of its help."""
    for option in reversed(options):
        function = option(function)
    return function


def global_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the global options; they may stand before the verb and after it."""
    return add_options(command, _GLOBAL)


def stackctl_command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a command of a function.

    The command has the global options, and its function gets a Session as the first argument.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        def call(**parameters: Any) -> None:
            context = click.get_current_context()
            before = context.find_root().params
            given = {key: parameters.pop(key) or before.get(key) for key in GLOBAL_NAMES}
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
    given: Mapping[str, Any], *, yes: bool = False, profile_folder: Path | None = None
) -> Session:
    """Return a session from the values of the global options."""
    out = Output(
        json=bool(given.get("json")),
        quiet=bool(given.get("quiet")),
        verbose=bool(given.get("verbose")),
        color=given.get("color") or "auto",
        progress=not given.get("no_progress"),
    )
    if out.verbose:
        from stackctl.machine import runner

        runner.observer = lambda command: out.note(f"$ {command}")
    asked = given.get("scope")
    scope: Literal["user", "system"] = asked or ("system" if os.geteuid() == 0 else "user")
    options = (f"--{asked}",) if asked else ()
    return Session(out, scope, yes, profile_folder, given.get("host"), options)
