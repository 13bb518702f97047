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

#: Verbs that run on this side and ask the box for data: always (None), or with this option.
_HERE = {"client": None, "bench": "--from-here"}
#: The verb that works on a box without stackctl, by a copy of this one.
_BRINGS = "provision"
#: Names that are not options of ssh and have no characters of a shell, because commands in ssh's
#: settings may contain the name.
_DESTINATION = re.compile(r"(?!-)[\w.@:/\[\]%+~-]+")


def run(arguments: Sequence[str], verbs: Sequence[str], out: Output) -> int | None:
    """Run a command line that has ``--host`` on that machine.

    Returns:
        The exit code of the box's stackctl; None if the command must run on this side.

    Raises:
        StackctlError: exit 1 if the connection cannot be made or breaks, 6 if there is no ssh here
            or no stackctl there, 2 if the destination is not valid.
    """
    destination, rest = split_destination(arguments)
    verb = next((word for word in rest if word in verbs), None)
    if verb in _HERE and (_HERE[verb] is None or _HERE[verb] in rest):
        return None
    there = remote.remote_host(destination)
    for line in there.connect():
        out.note(line)
    if verb == _BRINGS:
        from stackctl.cli import remote_bootstrap

        with remote_bootstrap.remote_program(there, rest, out) as words:
            status = _run(there, (*words, *rest), out)
    else:
        status = _run(there, (remote.PROGRAM, *rest), out)
    remote.check_exit_status(there, status)
    if status == ExitCode.USAGE:
        _explain_paths(out, destination, rest)
    return status


def _run(there: ssh.RemoteHost, argv: Sequence[str], out: Output) -> int:
    """Run a program of the box, on our terminal if there is one, and return its exit code."""
    try:
        if remote.on_terminal():
            return there.run_tty(remote.caller_env(there.destination), argv)
        sys.stdout.flush()
        return there.run(remote.caller_env(there.destination), argv, remote.write_box_stderr)
    except KeyboardInterrupt:
        out.warn(
            f"{there.destination} goes on by itself",
            f"{remote.remote_command(there.destination)} status",
        )
        raise


def split_destination(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the destination in a command line, and the command line without it.

    Raises StackctlError (exit 2) if there are several destinations or the name is not valid.
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
    """Note, after a usage error, the first path that exists here: the box may not have it."""
    for word in words:
        path = word.rpartition("=")[2].rpartition(":")[2]
        if "/" in path and Path(path).exists():
            out.note(f"{path} was looked for on {destination}: with --host every path is there")
            return
