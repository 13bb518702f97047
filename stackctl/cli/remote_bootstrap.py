"""Provisioning of a box that has no stackctl or an older one, by a copy of this stackctl.

The copy is sent for one run and removed after it. Only the items of ``provision`` stay, among them
the item ``stackctl``.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence

from stackctl import __version__
from stackctl.cli import remote
from stackctl.cli.output import Output
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ssh
from stackctl.provision import remote_bundle
from stackctl.quantity import format_bytes

#: Options with which ``provision`` changes nothing, so that it needs no root.
_LOOKS = frozenset({"--dry-run", "--help", "-h", "--version"})


@contextlib.contextmanager
def remote_program(
    there: ssh.RemoteHost, words: Sequence[str], out: Output
) -> Iterator[tuple[str, ...]]:
    """Yield the command that runs stackctl on the box: the installed one, or a temporary copy.

    Raises:
        StackctlError: exit 6 if there is no stackctl and no copy can run there; exit 2 if root is
            needed there and sudo does not permit it.
    """
    name = there.destination
    out.quiet = bool({"-q", "--quiet"} & set(words))
    status, text, said = there.query(remote_bundle.probe_command())
    if status:
        _require_connection(there, status)
        raise StackctlError(f"{name} runs no commands of sh: {said.strip() or status}")
    seen = remote_bundle.parse_probe(text)
    if seen.version is not None and not remote_bundle.is_older(seen.version, __version__):
        yield ("stackctl",)
        return
    with contextlib.ExitStack() as stack:
        try:
            brought = _bring(there, seen, words, out, stack)
        except StackctlError as error:
            if seen.version is None:
                raise
            out.warn(f"{name} keeps its stackctl {seen.version}: {error.message}", error.hint)
            brought = ("stackctl",)
        yield brought


def _bring(
    there: ssh.RemoteHost,
    seen: remote_bundle.RemoteFacts,
    words: Sequence[str],
    out: Output,
    stack: contextlib.ExitStack,
) -> tuple[str, ...]:
    name = there.destination
    target = seen.choose_python(name)
    sudo = _sudo(there, seen) if seen.uid != 0 and not _LOOKS & set(words) else ()
    data = remote_bundle.build_bundle(
        target, remote.local_paths().cache, lambda text: out.step("stackctl", text)
    )

    began = time.monotonic()

    def progress(done: int) -> None:
        text = f"{format_bytes(done)} of {format_bytes(len(data))} sent"
        out.progress("stackctl", text, elapsed_s=time.monotonic() - began)

    keep = remote_bundle.bootstrap_command(
        target, "keep", str(len(data)), str(remote_bundle.unpacked_bytes(data))
    )
    path = stack.enter_context(there.hold_upload(keep, data, progress))
    instead = f", which has {seen.version}," if seen.version else ""
    out.step(
        "stackctl",
        f"{__version__} is brought to {name}{instead} for this run ({format_bytes(len(data))})",
    )
    digest = hashlib.sha256(data).hexdigest()
    return (
        *sudo,
        *remote_bundle.bootstrap_command(target, "start", path, digest, remote.caller_env(name)),
    )


def _sudo(there: ssh.RemoteHost, seen: remote_bundle.RemoteFacts) -> tuple[str, ...]:
    """Return the words that run a command as root on the box.

    Raises StackctlError (exit 2) if sudo is missing there or does not permit it.
    """
    name = there.destination
    if not seen.sudo:
        raise StackctlError(
            f"provisioning changes the machine, which needs root, and {name} has no sudo",
            hint="--host root@...; --dry-run shows what would be done",
            exit_code=ExitCode.USAGE,
        )
    if remote.on_terminal():
        return ("sudo",)
    status, _, _ = there.query("sudo -n true")
    if status:
        _require_connection(there, status)
        raise StackctlError(
            "provisioning changes the machine, which needs root, and sudo does not let this user "
            f"of {name} without a password",
            hint="from a terminal sudo asks for it; or --host root@...; --dry-run shows what would "
            "be done",
            exit_code=ExitCode.USAGE,
        )
    return ("sudo", "-n")


def _require_connection(there: ssh.RemoteHost, status: int) -> None:
    """Raise StackctlError if the connection failed, not a program on the box."""
    if status == ssh.FAILED:
        remote.check_exit_status(there, status)
