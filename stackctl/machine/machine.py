"""Read facts from a live or a recorded machine, and write files atomically."""

from __future__ import annotations

import fnmatch
import glob as globbing
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security, runner
from stackctl.values.inspection import FileState

#: No fact is longer; a larger file under /proc or /sys is not the expected one.
_MOST_BYTES = 16 * 2**20
#: Links that every POSIX system follows (_POSIX_SYMLOOP_MAX); recordings have chains of 2 or 3.
_MOST_LINKS = 8


class Machine:
    """The machine that stackctl runs on. Paths are absolute."""

    #: False for a recording.
    live = True

    def read(self, path: str, *, most: int = _MOST_BYTES) -> str | None:
        """Return the text of a file, at most ``most`` bytes; None if it is absent or unreadable."""
        data = self._read(path, most)
        return None if data is None else data.decode("utf-8", "replace")

    def read_bytes(self, path: str) -> bytes | None:
        """Return the bytes of a file, at most 16 MiB; None if it is absent or unreadable."""
        return self._read(path, _MOST_BYTES)

    def glob(self, pattern: str) -> tuple[str, ...]:
        """Return the paths that match a shell pattern, sorted."""
        return tuple(sorted(globbing.glob(pattern)))

    def read_link(self, path: str) -> str | None:
        """Return the target of a symbolic link; None if it is not a link or unreadable."""
        try:
            return os.readlink(path)  # noqa: PTH115 - called for thousands of links
        except (OSError, ValueError):
            return None

    def file_state(self, path: str) -> FileState | None:
        """Return identity, size and times of the file at a path; None if it cannot be read."""
        place = self._place(path)
        if place is None:
            return None
        try:
            found = os.stat(place)  # noqa: PTH116 - the path is a str, as everywhere here
        except (OSError, ValueError):
            return None
        return FileState(
            device=found.st_dev,
            inode=found.st_ino,
            bytes=found.st_size,
            content_changed=found.st_mtime,
            changed=found.st_ctime,
        )

    def read_user_files(self, home: str, below: str, suffix: str) -> tuple[tuple[str, str], ...]:
        """Return path and text of the files ``HOME/BELOW/*/*SUFFIX``, as in
        path_security.read_user_files."""
        return tuple(path_security.read_user_files(home, below, suffix))

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> runner.Completed:
        """Run a command that only reads. Raises StackctlError if it cannot be run."""
        return runner.run(argv, check=False, timeout_s=timeout_s)

    def _place(self, path: str) -> str | None:
        """Return the place of a path on this machine; None if its links form a circle."""
        return path

    def _read(self, path: str, most: int) -> bytes | None:
        place = self._place(path)
        if place is None:
            return None
        try:
            with open(place, "rb", opener=_open_without_waiting) as stream:
                return stream.read(most)
        except (OSError, ValueError):
            return None


class RecordedMachine(Machine):
    """A machine recorded below a folder: its /proc and /sys, and outputs of commands.

    ``commands.json`` in that folder maps each command, as typed, to its stdout. A command that was
    not recorded is an error, so that a missing record is not taken for an empty output.
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

    def _place(self, path: str) -> str | None:
        """Follow the links of the recorded machine, which never lead out of the recording."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._walk(folder, self._root)
        above = self._folders[folder]
        return None if above is None else self._walk(name, above)

    def _walk(self, path: str, here: str) -> str | None:
        """Follow a path from a folder; links and ".." stay below the root, as after chroot(2)."""
        pending, links = path.split("/")[::-1], 0
        while pending:
            part = pending.pop()
            if part == "..":
                here = here if here == self._root else os.path.dirname(here)  # noqa: PTH120
            elif part not in ("", "."):
                place = f"{here}/{part}"
                try:
                    target = os.readlink(place)  # noqa: PTH115
                except (OSError, ValueError):  # not a link, or a name that no file can have
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

    def read_link(self, path: str) -> str | None:
        """See Machine."""
        folder, _, name = path.rpartition("/")
        above = self._place(folder)
        return None if above is None else super().read_link(f"{above}/{name}")

    def _names(self, folder: str, part: str) -> list[str]:
        """Return the names in a folder that match one part of a pattern."""
        if not globbing.has_magic(part):
            place = self._place(f"{folder}/{part}")
            return [part] if place is not None and os.path.exists(place) else []  # noqa: PTH110
        place = self._place(folder)
        try:
            names = [] if place is None else os.listdir(place or "/")  # noqa: PTH208
        except (OSError, ValueError):
            return []
        return [n for n in fnmatch.filter(names, part) if part[0] == "." or n[0] != "."]

    def read_user_files(self, home: str, below: str, suffix: str) -> tuple[tuple[str, str], ...]:
        """See Machine."""
        root = str(self._root)
        found = path_security.read_user_files(f"{root}/{home.lstrip('/')}", below, suffix)
        return tuple((path[len(root) :], text) for path, text in found)

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> runner.Completed:  # noqa: ARG002
        """See Machine."""
        command = shlex.join(argv)
        if command not in self._commands:
            raise StackctlError(f"not recorded: {command}", exit_code=ExitCode.HOST)
        return runner.Completed(tuple(argv), 0, self._commands[command], "")


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file at once, so that a pipe in its place is read as empty."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
