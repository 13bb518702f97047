"""``--host``: run the same command line by the stackctl of another machine, over ssh."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stackctl.cli import remote
from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ssh

#: Verbs that work on this side, and ask the box for what they need; of others, with which option.
_HERE = {"client": None, "bench": "--from-here"}
#: The verb that makes a box ready, by this stackctl where it has none.
_BRINGS = "provision"
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
    there = remote.box(destination)
    for line in there.open():
        out.note(line)
    if verb == _BRINGS:
        from stackctl.cli import bring

        with bring.program(there, rest, out) as words:
            status = _run(there, (*words, *rest), out)
    else:
        status = _run(there, (remote.PROGRAM, *rest), out)
    remote.require(there, status)
    if status == ExitCode.USAGE:
        _explain_paths(out, destination, rest)
    return status


def _run(there: ssh.Box, argv: Sequence[str], out: Output) -> int:
    """Run a program of the box with our terminal, or what we have for one."""
    try:
        if remote.on_terminal():
            return there.call_on_terminal(remote.caller(there.destination), argv)
        sys.stdout.flush()
        return there.call(remote.caller(there.destination), argv, remote.pass_on)
    except KeyboardInterrupt:
        out.warn(
            f"{there.destination} goes on by itself", f"{remote.command(there.destination)} status"
        )
        raise


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


def _explain_paths(out: Output, destination: str, words: Sequence[str]) -> None:
    """After a usage error: a file that is here and not there may be the reason."""
    for word in words:
        path = word.rpartition("=")[2].rpartition(":")[2]
        if "/" in path and Path(path).exists():
            out.note(f"{path} was looked for on {destination}: with --host every path is there")
            return
