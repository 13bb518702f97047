"""Another machine over ssh: its name, and documents of its stackctl."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

from stackctl import __version__
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ssh
from stackctl.machine.runner import controlled_environment
from stackctl.state.paths import Paths, paths

PROGRAM = "stackctl"


def on_terminal() -> bool:
    """Whether somebody can be asked, and all that is said is seen."""
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def box(destination: str) -> ssh.Box:
    """The box of that name, with its sockets in this user's runtime folder."""
    return ssh.Box(destination, here().runtime / "ssh")


def here() -> Paths:
    """This user's folders on this side."""
    return paths("system" if os.geteuid() == 0 else "user", controlled_environment())


def command(destination: str) -> str:
    """How a command for that box begins."""
    return f"stackctl --host {shlex.quote(destination)}"


def caller(destination: str) -> str:
    """What the box is told of who calls it: our version, and what we call the box."""
    return f"{__version__} {destination}"


def fetch(destination: str, arguments: Sequence[str]) -> bytes:
    """What the box's stackctl prints with ``--json``.

    Raises:
        StackctlError: its own error, with its exit code; exit 1 when the connection cannot be made
            or broke, 6 when there is no ssh here or no stackctl there.
    """
    from stackctl.values.base import from_json
    from stackctl.values.result import ErrorReport

    there = box(destination)
    there.open()
    status, text = there.fetch(caller(destination), (PROGRAM, *arguments), pass_on)
    require(there, status)
    if status:
        error = from_json(text, ErrorReport, where=destination)
        raise StackctlError(
            f"{destination}: {error.message}",
            hint=error.hint,
            details=error.details,
            exit_code=ExitCode(error.exit_code),
        )
    return text


def require(there: ssh.Box, status: int) -> None:
    """Raise StackctlError for an exit status that is none of stackctl's."""
    if status in ssh.ABSENT:
        raise StackctlError(
            f"there is no stackctl on {there.destination}",
            hint=f"{command(there.destination)} provision --dry-run\n"
            "shows what it would change; without --dry-run it installs stackctl, too",
            exit_code=ExitCode.HOST,
        )
    if status != ssh.FAILED:
        return
    again = f"{command(there.destination)} status tells what became of it"
    if there.connected():
        raise StackctlError(f"stackctl was killed on {there.destination}", hint=again)
    raise StackctlError(
        f"the connection to {there.destination} broke",
        details=("the box finishes the change, or restores the previous state",),
        hint=again,
    )


def pass_on(part: bytes) -> None:
    """Write a message of the box's stackctl to stderr."""
    # A reader that has gone does not stop the box.
    with contextlib.suppress(OSError):
        os.write(2, part)
