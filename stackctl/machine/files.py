"""Reading facts from a machine, live or recorded; writing files so that none is half there."""

from __future__ import annotations

import contextlib
import glob as globbing
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner, trust

#: No fact is longer; anything larger under /proc or /sys is not what we think it is.
_MOST_BYTES = 16 * 2**20


class Machine(Protocol):
    """Where facts come from. Paths are absolute, as seen on that machine."""

    @property
    def live(self) -> bool:
        """Whether this is the machine we run on."""
        ...

    def read(self, path: str) -> str | None:
        """The text of a file; None when it is absent or cannot be read."""
        ...

    def read_bytes(self, path: str) -> bytes | None:
        """The bytes of a file; None when it is absent or cannot be read."""
        ...

    def glob(self, pattern: str) -> tuple[str, ...]:
        """Paths that match a shell pattern, sorted."""
        ...

    def owned_texts(self, home: str, below: str, suffix: str) -> tuple[tuple[str, str], ...]:
        """Path and text of ``HOME/BELOW/*/*SUFFIX``, as data of the home's owner: see trust."""
        ...

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> runner.Completed:
        """Run a command that only reads. Raises StackctlError when it cannot be run."""
        ...


class LiveMachine:
    """The machine we run on."""

    live = True

    def read(self, path: str) -> str | None:
        """See Machine."""
        return _text(_read(path))

    def read_bytes(self, path: str) -> bytes | None:
        """See Machine."""
        return _read(path)

    def glob(self, pattern: str) -> tuple[str, ...]:
        """See Machine."""
        return tuple(sorted(globbing.glob(pattern)))

    def owned_texts(self, home: str, below: str, suffix: str) -> tuple[tuple[str, str], ...]:
        """See Machine."""
        return tuple(trust.owned_texts(home, below, suffix))

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> runner.Completed:
        """See Machine."""
        return runner.run(argv, check=False, timeout_s=timeout_s)


class RecordedMachine:
    """A machine recorded below a folder: its /proc and /sys, and outputs of commands.

    ``commands.json`` in that folder maps a command as typed to what it printed on stdout. A command
    that was not recorded is an error, so that nothing is mistaken for an empty answer.
    """

    live = False

    def __init__(self, root: Path) -> None:
        if not (root / "proc").is_dir() and not (root / "sys").is_dir():
            raise StackctlError(
                f"{root} holds no recorded machine",
                hint="a folder with proc/ and sys/ below it",
                exit_code=ExitCode.USAGE,
            )
        self._root = root.resolve()
        recorded = _text(_read(str(self._root / "commands.json")))
        try:
            self._commands: dict[str, str] = json.loads(recorded) if recorded else {}
        except ValueError as error:
            raise StackctlError(
                f"{root}/commands.json is not valid JSON: {error}", exit_code=ExitCode.USAGE
            ) from None

    def read(self, path: str) -> str | None:
        """See Machine. Links are followed only inside the recording."""
        return _text(self._recorded(path))

    def read_bytes(self, path: str) -> bytes | None:
        """See Machine. Links are followed only inside the recording."""
        return self._recorded(path)

    def _recorded(self, path: str) -> bytes | None:
        try:
            target = (self._root / path.lstrip("/")).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL in the path, a loop of links
            return None
        return _read(str(target)) if target.is_relative_to(self._root) else None

    def glob(self, pattern: str) -> tuple[str, ...]:
        """See Machine."""
        root = globbing.escape(str(self._root))
        found = globbing.glob(root + "/" + pattern.lstrip("/"))
        return tuple(sorted(path[len(str(self._root)) :] for path in found))

    def owned_texts(self, home: str, below: str, suffix: str) -> tuple[tuple[str, str], ...]:
        """See Machine."""
        root = str(self._root)
        found = trust.owned_texts(f"{root}/{home.lstrip('/')}", below, suffix)
        return tuple((path[len(root) :], text) for path, text in found)

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> runner.Completed:  # noqa: ARG002
        """See Machine."""
        command = shlex.join(argv)
        if command not in self._commands:
            raise StackctlError(f"not recorded: {command}", exit_code=ExitCode.HOST)
        return runner.Completed(tuple(argv), 0, self._commands[command], "")


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb", opener=_opener) as stream:
            return stream.read(_MOST_BYTES)
    except (OSError, ValueError):
        return None


def _opener(path: str, flags: int) -> int:
    """Opens without waiting: a pipe in the place of a file is empty."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "replace")


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file so that readers see the old text or the new one, also after a power loss.

    The temporary file is a dotfile without a unit suffix, which neither systemd nor Quadlet loads.
    A file for its owner only (0600) gets folders for their owner only.

    Raises:
        StackctlError: with the reason (disk full, no permission); nothing is left behind. Exit 2
            for a path that goes over somebody else's link.
    """
    trust.require_not_planted(path.parent)
    temporary = None
    try:
        if mode & 0o077:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            trust.make_private(path.parent)
        descriptor, temporary = tempfile.mkstemp(
            prefix=".stackctl-", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StackctlError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
