"""``--host``: the same command, run by the stackctl of another machine over ssh."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from stackctl import __version__
from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ssh
from stackctl.machine.runner import controlled_environment
from stackctl.state.paths import Paths, paths

#: Verbs that work on this side, and ask the box for what they need; of others, with which option.
_HERE = {"client": None, "bench": "--from-here"}
#: The verb that makes a box ready, by this stackctl where it has none.
_BRINGS = "provision"
_PROGRAM = "stackctl"
#: No option of ssh, and nothing that a command in its settings could take for more than a name.
_DESTINATION = re.compile(r"(?!-)[\w.@:/\[\]%+~-]+")


def run(arguments: Sequence[str], verbs: Sequence[str], out: Output) -> int | None:
    """Run a command line that has ``--host`` on that machine; None: it is one to be run here.

    Returns:
        The exit code of the box's stackctl.

    Raises:
        StackctlError: exit 1 when the connection cannot be made or broke, 6 when there is no ssh
            here or no stackctl there, 2 for what is no destination.
    """
    destination, rest = split(arguments)
    verb = next((word for word in rest if word in verbs), None)
    if verb in _HERE and (_HERE[verb] is None or _HERE[verb] in rest):
        return None
    there = box(destination)
    for line in there.open():
        out.note(line)
    if verb == _BRINGS:
        from stackctl.cli import bring

        with bring.program(there, rest, out) as words:
            status = _run(there, (*words, *rest), out)
    else:
        status = _run(there, (_PROGRAM, *rest), out)
    require(there, status)
    if status == ExitCode.USAGE:
        _explain_paths(out, destination, rest)
    return status


def _run(there: ssh.Box, argv: Sequence[str], out: Output) -> int:
    """Run a program of the box with our terminal, or what we have for one."""
    try:
        if on_terminal():
            return there.call_on_terminal(caller(there.destination), argv)
        sys.stdout.flush()
        return there.call(caller(there.destination), argv, _tell)
    except KeyboardInterrupt:
        out.warn(f"{there.destination} goes on by itself", f"{command(there.destination)} status")
        raise


def on_terminal() -> bool:
    """Whether somebody can be asked, and all that is said is seen."""
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The destination in a command line, and the command line without it.

    Raises StackctlError (exit 2) for several, and for what is no destination.
    """
    found, rest, words = [], [], iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--host":
            found.append(next(words, ""))
        elif word.startswith("--host="):
            found.append(word.removeprefix("--host="))
        else:
            rest.append(word)
    if len(found) != 1 or not _DESTINATION.fullmatch(found[0]):
        raise StackctlError(
            "--host takes one machine" if len(found) > 1 else f"invalid host {found[0]!r}",
            hint="--host USER@BOX, as ssh takes it",
            exit_code=ExitCode.USAGE,
        )
    return found[0], rest


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
        StackctlError: its own error, with its exit code; else as ``run``.
    """
    from stackctl.values.base import from_json
    from stackctl.values.result import ErrorReport

    there = box(destination)
    there.open()
    status, text = there.fetch(caller(destination), (_PROGRAM, *arguments), _tell)
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
        details=("what was begun goes on there: it is finished, or what was before is restored",),
        hint=again,
    )


def _tell(part: bytes) -> None:
    """Pass on what the box's stackctl has said."""
    # That nobody reads it any more does not stop the box.
    with contextlib.suppress(OSError):
        os.write(2, part)


def _explain_paths(out: Output, destination: str, words: Sequence[str]) -> None:
    """After a usage error: a file that is here and not there may be the reason."""
    for word in words:
        path = word.rpartition("=")[2].rpartition(":")[2]
        if "/" in path and Path(path).exists():
            out.note(f"{path} was looked for on {destination}: with --host every path is there")
            return
