"""The machine that is made ready, live or below a folder."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import Machine
from stackctl.machine.runner import Completed

_MOST_VALUE = 4096


@dataclass(frozen=True)
class Box:
    """Facts come through ``machine``; what is written goes below ``root``, "/" on the live one."""

    machine: Machine
    root: Path = Path("/")

    def at(self, path: str) -> Path:
        """Where a path of the machine is."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """The text of a file; None when it is absent or cannot be read."""
        return self.machine.read(path)

    def value(self, path: str) -> str | None:
        """The value in a file of the kernel; of several that it shows, the one in brackets."""
        # /proc/sys refuses readers who offer more room than the kernel could fill.
        text = self.machine.read(path, most=_MOST_VALUE)
        if text is None:
            return None
        _, bracket, rest = text.partition("[")
        return rest.partition("]")[0] if bracket else text.strip()

    def there(self, path: str) -> bool:
        """Whether something is at a path, if only a link that leads nowhere."""
        return os.path.lexists(self.at(path))

    def stat(self, path: str) -> os.stat_result | None:
        """What is at a path itself, links not followed."""
        try:
            return self.at(path).lstat()
        except OSError:
            return None

    def is_plain(self, path: str) -> bool:
        """Whether a regular file is at a path."""
        found = self.stat(path)
        return found is not None and stat.S_ISREG(found.st_mode)

    def may_write(self, path: str) -> bool:
        """Whether a file of the kernel could be written by root: not on a read-only mount."""
        with contextlib.suppress(OSError):
            return not os.statvfs(self.at(path)).f_flag & os.ST_RDONLY
        return False

    def ask(self, *argv: str, timeout_s: float = 60) -> Completed | None:
        """A command that only reads; None where it cannot be run or does not answer."""
        try:
            return self.machine.run(argv, timeout_s=timeout_s)
        except StackctlError:
            return None
