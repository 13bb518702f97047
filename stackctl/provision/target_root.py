"""The machine to prepare: the live one or one below a folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.runner import Completed

_MOST_VALUE = 4096


@dataclass(frozen=True)
class TargetRoot:
    """A machine: ``machine`` reads facts, and files are written below ``root`` ("/" if live)."""

    machine: Machine
    root: Path = Path("/")

    def path_of(self, path: str) -> Path:
        """Return the place of one of the machine's paths, below ``root``."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """Return the text of a file; None if it is absent or unreadable."""
        return self.machine.read(path)

    def kernel_value(self, path: str) -> str | None:
        """Return the value in a file of the kernel; the one in brackets if it lists all choices.

        None if the file is absent or unreadable.
        """
        # A read from /proc/sys with a large buffer fails (ENOMEM, fs/proc/proc_sysctl.c).
        text = self.machine.read(path, most=_MOST_VALUE)
        if text is None:
            return None
        _, bracket, rest = text.partition("[")
        return rest.partition("]")[0] if bracket else text.strip()

    def exists(self, path: str) -> bool:
        """Return True if a path exists, even as a dangling link."""
        return os.path.lexists(self.path_of(path))

    def stat(self, path: str) -> os.stat_result | None:
        """Return the status of a path (lstat); None if it does not exist or cannot be reached."""
        try:
            return self.path_of(path).lstat()
        except OSError:
            return None

    def may_write(self, path: str) -> bool:
        """Return True if root can write a file of the kernel: its mount is not read-only."""
        with contextlib.suppress(OSError):
            return not os.statvfs(self.path_of(path)).f_flag & os.ST_RDONLY
        return False

    def query(self, *argv: str, timeout_s: float = 60) -> Completed | None:
        """Run a command that only reads; None if it does not start or takes longer than that."""
        try:
            return self.machine.run(argv, timeout_s=timeout_s)
        except StackctlError:
            return None
