"""Reading facts from a machine, live or recorded; writing files so that none is half there."""

from __future__ import annotations

import contextlib
import fnmatch
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
from stackctl.values.seen import FileState

#: No fact is longer; anything larger under /proc or /sys is not what we think it is.
_MOST_BYTES = 16 * 2**20
#: What every POSIX system follows (_POSIX_SYMLOOP_MAX); recordings hold chains of two or three.
_MOST_LINKS = 8


class Machine(Protocol):
    """Where facts come from. Paths are absolute, as seen on that machine."""

    @property
    def live(self) -> bool:
        """Whether this is the machine we run on."""
        ...

    def read(self, path: str, *, most: int = _MOST_BYTES) -> str | None:
        """The text of a file, ``most`` bytes of it; None when it is absent or cannot be read."""
        ...

    def read_bytes(self, path: str) -> bytes | None:
        """The bytes of a file; None when it is absent or cannot be read."""
        ...

    def glob(self, pattern: str) -> tuple[str, ...]:
        """Paths that match a shell pattern, sorted."""
        ...

    def link(self, path: str) -> str | None:
        """What a symbolic link says; None when it is none or cannot be read."""
        ...

    def state(self, path: str) -> FileState | None:
        """Which file a path leads to; None when there is none or it cannot be seen."""
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

    def read(self, path: str, *, most: int = _MOST_BYTES) -> str | None:
        """See Machine."""
        return _text(_read(path, most))

    def read_bytes(self, path: str) -> bytes | None:
        """See Machine."""
        return _read(path)

    def glob(self, pattern: str) -> tuple[str, ...]:
        """See Machine."""
        return tuple(sorted(globbing.glob(pattern)))

    def link(self, path: str) -> str | None:
        """See Machine."""
        return _link(path)

    def state(self, path: str) -> FileState | None:
        """See Machine."""
        return _state(path)

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
        self._root = str(root.resolve()).rstrip("/")
        self._folders: dict[str, str | None] = {}
        recorded = self.read("/commands.json")
        try:
            commands = json.loads(recorded) if recorded else {}
        except (ValueError, RecursionError) as error:
            raise StackctlError(
                f"{root}/commands.json is not valid JSON: {error}", exit_code=ExitCode.USAGE
            ) from None
        if not isinstance(commands, dict) or not all(
            isinstance(said, str) for said in commands.values()
        ):
            raise StackctlError(
                f"{root}/commands.json is not a map of commands to what they print",
                exit_code=ExitCode.USAGE,
            )
        self._commands: dict[str, str] = commands

    def read(self, path: str, *, most: int = _MOST_BYTES) -> str | None:
        """See Machine. Links lead where they led on that machine: never out of the recording."""
        return _text(self._recorded(path, most))

    def read_bytes(self, path: str) -> bytes | None:
        """See Machine."""
        return self._recorded(path, _MOST_BYTES)

    def _recorded(self, path: str, most: int) -> bytes | None:
        place = self._place(path)
        return None if place is None else _read(place, most)

    def _place(self, path: str) -> str | None:
        """Where a path of that machine lies here; None when it leads in a circle."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._walk(folder, self._root)
        above = self._folders[folder]
        return None if above is None else self._walk(name, above)

    def _walk(self, path: str, here: str) -> str | None:
        """Follows a path from a folder; links and ".." stay below the root, as after chroot."""
        pending, links = path.split("/")[::-1], 0
        while pending:
            part = pending.pop()
            if part == "..":
                here = here if here == self._root else os.path.dirname(here)  # noqa: PTH120
            elif part not in ("", "."):
                place = f"{here}/{part}"
                try:
                    target = os.readlink(place)  # noqa: PTH115
                except (OSError, ValueError):  # no link, or a name that no file can have
                    here = place
                    continue
                links += 1
                if links > _MOST_LINKS:
                    return None
                here = self._root if target.startswith("/") else here
                pending += target.split("/")[::-1]
        return here

    def glob(self, pattern: str) -> tuple[str, ...]:
        """See Machine."""
        found = [""]
        for part in pattern.strip("/").split("/"):
            found = [f"{path}/{name}" for path in found for name in self._names(path, part)]
        return tuple(sorted(found))

    def link(self, path: str) -> str | None:
        """See Machine."""
        folder, _, name = path.rpartition("/")
        above = self._place(folder)
        return None if above is None else _link(f"{above}/{name}")

    def state(self, path: str) -> FileState | None:
        """See Machine."""
        place = self._place(path)
        return None if place is None else _state(place)

    def _names(self, folder: str, part: str) -> list[str]:
        """What a part of a pattern matches in a folder."""
        if not globbing.has_magic(part):
            place = self._place(f"{folder}/{part}")
            return [part] if place is not None and os.path.exists(place) else []  # noqa: PTH110
        place = self._place(folder)
        try:
            names = [] if place is None else os.listdir(place or "/")  # noqa: PTH208
        except (OSError, ValueError):
            return []
        return [n for n in fnmatch.filter(names, part) if part[0] == "." or n[0] != "."]

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


def _read(path: str, most: int = _MOST_BYTES) -> bytes | None:
    try:
        with open(path, "rb", opener=_opener) as stream:
            return stream.read(most)
    except (OSError, ValueError):
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)  # noqa: PTH115 - thousands of them
    except (OSError, ValueError):
        return None


def _state(path: str) -> FileState | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a text, as everywhere here
    except (OSError, ValueError):
        return None
    return FileState(
        device=found.st_dev,
        inode=found.st_ino,
        bytes=found.st_size,
        content_changed=found.st_mtime,
        changed=found.st_ctime,
    )


def _opener(path: str, flags: int) -> int:
    """Opens without waiting: a pipe in the place of a file is empty."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "replace")


def write_atomically(
    path: Path, text: str, *, mode: int = 0o644, keep_folder: bool = False
) -> None:
    """Write a file so that readers see the old text or the new one, also after a power loss.

    The temporary file is a dotfile without a unit suffix, which neither systemd nor Quadlet loads.
    A file for its owner only (0600) gets folders for their owner only, unless ``keep_folder`` says
    that the folder is not ours to change.

    Raises:
        StackctlError: with the reason (disk full, no permission); nothing is left behind. Exit 2
            for a path that goes over somebody else's link.
    """
    trust.require_not_planted(path.parent)
    temporary = None
    try:
        if mode & 0o077 or keep_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            trust.private_folder(path.parent)
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


def remove_file(path: Path) -> bool:
    """Remove a file so that it stays gone after a power loss; whether there was one.

    Raises:
        StackctlError: with the reason.
    """
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StackctlError(f"cannot remove {path}: {error.strerror or error}") from None
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
