"""``--host``: the stackctl of another machine over ssh.

It runs the same command line (``run``), or is asked for a document (``fetch_json``). For
``provision`` a box that has no stackctl or an older one gets a copy of this one for the run. Only
the items of ``provision`` stay there, among them the item ``stackctl``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stackctl import __version__
from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ssh
from stackctl.machine.runner import controlled_environment
from stackctl.quantity import format_bytes
from stackctl.state.paths import Paths, scope_paths

if TYPE_CHECKING:
    from stackctl.provision.remote_bundle import RemoteFacts

#: Verbs that run on this side and ask the box for data: always (None), or with this option.
_HERE = {"client": None, "bench": "--from-here"}
#: The verb that works on a box without stackctl, by a copy of this one.
_BRINGS = "provision"
#: Names that are not options of ssh and have no characters of a shell, because commands in ssh's
#: settings may contain the name.
_DESTINATION = re.compile(r"(?!-)[\w.@:/\[\]%+~-]+")
#: Options with which ``provision`` changes nothing, so that it needs no root.
_LOOKS = frozenset({"--dry-run", "--help", "-h", "--version"})


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
    there = remote_host(destination)
    for line in there.connect():
        out.note(line)
    if verb == _BRINGS:
        with _remote_program(there, rest, out) as words:
            status = _run(there, (*words, *rest), out)
    else:
        status = _run(there, ("stackctl", *rest), out)
    _check_exit_status(there, status)
    if status == ExitCode.USAGE:
        _explain_paths(out, destination, rest)
    return status


def _run(there: ssh.RemoteHost, argv: Sequence[str], out: Output) -> int:
    """Run a program of the box, on our terminal if there is one, and return its exit code."""
    try:
        if _on_terminal():
            return there.run_tty(_caller_env(there.destination), argv)
        sys.stdout.flush()
        return there.run(_caller_env(there.destination), argv, _write_box_stderr)
    except KeyboardInterrupt:
        out.warn(
            f"{there.destination} goes on by itself", f"{remote_command(there.destination)} status"
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


def _on_terminal() -> bool:
    """Return True if stdin, stdout and stderr are terminals."""
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def remote_host(destination: str) -> ssh.RemoteHost:
    """Return the box of that name, with its sockets in this user's runtime folder."""
    return ssh.RemoteHost(destination, _local_paths().runtime / "ssh")


def _local_paths() -> Paths:
    """Return this user's folders on this side."""
    return scope_paths("system" if os.geteuid() == 0 else "user", controlled_environment())


def remote_command(destination: str) -> str:
    """Return the beginning of a command for that box."""
    return f"stackctl --host {shlex.quote(destination)}"


def _caller_env(destination: str) -> str:
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
    status, text = there.fetch(
        _caller_env(destination), ("stackctl", *arguments), _write_box_stderr
    )
    _check_exit_status(there, status)
    if status:
        error = from_json(text, ErrorReport, where=destination)
        raise StackctlError(
            f"{destination}: {error.message}",
            hint=error.hint,
            details=error.details,
            exit_code=ExitCode(error.exit_code),
        )
    return text


def _check_exit_status(there: ssh.RemoteHost, status: int) -> None:
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


def _write_box_stderr(part: bytes) -> None:
    """Write a message of the box's stackctl to stderr."""
    # A closed stderr must not stop the command on the box.
    with contextlib.suppress(OSError):
        os.write(2, part)


@contextlib.contextmanager
def _remote_program(
    there: ssh.RemoteHost, words: Sequence[str], out: Output
) -> Iterator[tuple[str, ...]]:
    """Yield the command that runs stackctl on the box: the installed one, or a temporary copy.

    Raises:
        StackctlError: exit 6 if there is no stackctl and no copy can run there; exit 2 if root is
            needed there and sudo does not permit it.
    """
    from stackctl.provision import remote_bundle

    name = there.destination
    out.quiet = bool({"-q", "--quiet"} & set(words))
    status, text, said = there.query(remote_bundle.probe_command())
    if status:
        _require_connection(there, status)
        raise StackctlError(f"{name} runs no commands of sh: {said.strip() or status}")
    seen = remote_bundle.parse_probe(text)
    program: tuple[str, ...] = ("stackctl",)
    with contextlib.ExitStack() as stack:
        if seen.version is None or remote_bundle.is_older(seen.version, __version__):
            try:
                program = _bring(there, seen, words, out, stack)
            except StackctlError as error:
                if seen.version is None:
                    raise
                out.warn(f"{name} keeps its stackctl {seen.version}: {error.message}", error.hint)
        yield program


def _bring(
    there: ssh.RemoteHost,
    seen: RemoteFacts,
    words: Sequence[str],
    out: Output,
    stack: contextlib.ExitStack,
) -> tuple[str, ...]:
    from stackctl.provision import remote_bundle

    name = there.destination
    target = seen.choose_python(name)
    sudo = _sudo(there, seen) if seen.uid != 0 and not _LOOKS & set(words) else ()
    tell = functools.partial(out.step, "stackctl")
    data = remote_bundle.build_bundle(target, _local_paths().cache, tell)
    began = time.monotonic()

    def progress(done: int) -> None:
        text = f"{format_bytes(done)} of {format_bytes(len(data))} sent"
        out.progress("stackctl", text, elapsed_s=time.monotonic() - began)

    keep = remote_bundle.bootstrap_command(
        target, "keep", str(len(data)), str(remote_bundle.unpacked_bytes(data))
    )
    path = stack.enter_context(there.hold_upload(keep, data, progress))
    instead = f", which has {seen.version}," if seen.version else ""
    tell(f"{__version__} is brought to {name}{instead} for this run ({format_bytes(len(data))})")
    digest = hashlib.sha256(data).hexdigest()
    start = remote_bundle.bootstrap_command(target, "start", path, digest, _caller_env(name))
    return (*sudo, *start)


def _sudo(there: ssh.RemoteHost, seen: RemoteFacts) -> tuple[str, ...]:
    """Return the words that run a command as root on the box.

    Raises StackctlError (exit 2) if sudo is missing there or does not permit it.
    """
    hint = "--host root@...; --dry-run shows what would be done"
    if not seen.sudo:
        problem = f"{there.destination} has no sudo"
    elif _on_terminal():
        return ("sudo",)
    else:
        status, _, _ = there.query("sudo -n true")
        if not status:
            return ("sudo", "-n")
        _require_connection(there, status)
        problem = f"sudo does not let this user of {there.destination} without a password"
        hint = f"from a terminal sudo asks for it; or {hint}"
    raise StackctlError(
        f"provisioning changes the machine, which needs root, and {problem}",
        hint=hint,
        exit_code=ExitCode.USAGE,
    )


def _require_connection(there: ssh.RemoteHost, status: int) -> None:
    """Raise StackctlError if the connection failed, not a program on the box."""
    if status == ssh.FAILED:
        _check_exit_status(there, status)
