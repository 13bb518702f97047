"""The stackctl of another machine over ssh: its command, its documents and its failures."""

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
from stackctl.state.paths import Paths, scope_paths

PROGRAM = "stackctl"


def on_terminal() -> bool:
    """Return True if stdin, stdout and stderr are terminals."""
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def remote_host(destination: str) -> ssh.RemoteHost:
    """Return the box of that name, with its sockets in this user's runtime folder."""
    return ssh.RemoteHost(destination, local_paths().runtime / "ssh")


def local_paths() -> Paths:
    """Return this user's folders on this side."""
    return scope_paths("system" if os.geteuid() == 0 else "user", controlled_environment())


def remote_command(destination: str) -> str:
    """Return the beginning of a command for that box."""
    return f"stackctl --host {shlex.quote(destination)}"


def caller_env(destination: str) -> str:
    """Return the value of STACKCTL_CALLER for the box: our version, and our name for the box."""
    return f"{__version__} {destination}"


def fetch_json(destination: str, arguments: Sequence[str]) -> bytes:
    """Run the box's stackctl with arguments that include ``--json``, and return its document.

    Raises:
        StackctlError: its own error, with its exit code; exit 1 if the connection cannot be made
            or breaks, 6 if there is no ssh here or no stackctl there.
    """
    from stackctl.values.base import from_json
    from stackctl.values.result import ErrorReport

    there = remote_host(destination)
    there.connect()
    status, text = there.fetch(caller_env(destination), (PROGRAM, *arguments), write_box_stderr)
    check_exit_status(there, status)
    if status:
        error = from_json(text, ErrorReport, where=destination)
        raise StackctlError(
            f"{destination}: {error.message}",
            hint=error.hint,
            details=error.details,
            exit_code=ExitCode(error.exit_code),
        )
    return text


def check_exit_status(there: ssh.RemoteHost, status: int) -> None:
    """Raise StackctlError if an exit status comes from ssh or the shell, not from stackctl."""
    if status in ssh.ABSENT:
        raise StackctlError(
            f"there is no stackctl on {there.destination}",
            hint=f"{remote_command(there.destination)} provision --dry-run\n"
            "shows what it would change; without --dry-run it installs stackctl, too",
            exit_code=ExitCode.HOST,
        )
    if status != ssh.FAILED:
        return
    again = f"{remote_command(there.destination)} status tells what became of it"
    if there.is_connected():
        raise StackctlError(f"stackctl was killed on {there.destination}", hint=again)
    raise StackctlError(
        f"the connection to {there.destination} broke",
        details=("the box finishes the change, or restores the previous state",),
        hint=again,
    )


def write_box_stderr(part: bytes) -> None:
    """Write a message of the box's stackctl to stderr."""
    # A closed stderr must not stop the command on the box.
    with contextlib.suppress(OSError):
        os.write(2, part)
