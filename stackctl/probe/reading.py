"""Reading facts from files: what is absent is None, what is damaged is None and a Problem."""

from __future__ import annotations

import glob
import re
from functools import lru_cache

from stackctl.errors import StackctlError
from stackctl.machine.files import Machine
from stackctl.values.cpulist import CpuList
from stackctl.values.host import Problem

#: Linux supports at most 8192 CPUs; a list that names far more in all is a damaged file.
_MOST_CPUS = 16384
#: An attribute of sysfs fits a page, a list of 8192 CPUs some more. Thousands are read: hostile
#: recordings of long ones must not take minutes.
_MOST_ATTRIBUTE = 4096
_MOST_LIST = 32768
#: Fits a 64-bit integer, and so any JSON reader.
_NUMBER = re.compile(r"[0-9]{1,18}")
_WORD = re.compile(r"[0-9a-fA-F]{1,8}")


@lru_cache(maxsize=4096)
def cpu_set(text: str) -> frozenset[int]:
    """The CPUs of a kernel list, in bounded time whatever it says.

    Raises StackctlError for anything that is not a list.
    """
    found: set[int] = set()
    named = 0
    # Recordings of some machines hold whole pages, filled up with NULs.
    for item in text.strip("\0 \t\r\n").split(","):
        part = CpuList.parse(item)
        named += max(1, len(part))
        if named > _MOST_CPUS:
            raise StackctlError("it names more CPUs than a machine can have")
        found.update(part)
    return frozenset(found)


@lru_cache(maxsize=4096)
def mask_set(text: str) -> frozenset[int]:
    """The CPUs of a kernel mask such as "00000001,0000000f".

    Raises StackctlError for anything that is not a mask.
    """
    words = text.strip("\0 \t\r\n").split(",")
    if len(words) > _MOST_CPUS // 32 or not all(_WORD.fullmatch(word) for word in words):
        raise StackctlError("it is not a CPU mask")
    mask = 0
    for word in words:
        mask = mask << 32 | int(word, 16)
    return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def tidy(text: str, *, most: int = 200) -> str | None:
    """Text fit for a terminal and a document: one line, printable, not too long; None if empty."""
    words = "".join(char if char.isprintable() else " " for char in text[: 4 * most]).split()
    return " ".join(words)[:most].strip() or None


class Reader:
    """Reads facts of one machine and remembers which files were damaged."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._damaged: dict[str, list[tuple[str, str]]] = {}

    def text(self, path: str, most: int = _MOST_ATTRIBUTE) -> str | None:
        """The text of a file, or None. A path that no file can have is absent, not an error.

        Of files of /sys it is the first ``most`` bytes.
        """
        if not path.isprintable() or len(path) > 4096:
            return None
        if path.startswith("/sys/"):
            return self.machine.read(path, most=most)
        return self.machine.read(path)

    def raw(self, path: str, most: int) -> bytes | None:
        """The first bytes of a file that is no text."""
        held = self.machine.read_bytes(path)
        return None if held is None else held[:most]

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self.machine.glob(glob.escape(path)))

    def line(self, path: str) -> str | None:
        """A file of one short line; None when absent or empty."""
        text = self.text(path)
        return None if text is None else tidy(text)

    def number(self, path: str) -> int | None:
        """A file that holds one number that is not negative; -1 is the kernel's "unknown"."""
        text = self.text(path)
        if text is None:
            return None
        text = text.strip("\0 \t\r\n")
        if text == "-1":
            return None
        if not _NUMBER.fullmatch(text):
            self.damaged(path, f"{tidy(text, most=40) or ''!r} is not a number")
            return None
        return int(text)

    def cpus(self, path: str) -> frozenset[int] | None:
        """A file that holds a CPU list; an empty list is empty, not unknown."""
        text = self.text(path, _MOST_LIST)
        if text is None:
            return None
        try:
            return cpu_set(text)
        except StackctlError:
            self.damaged(path, f"{tidy(text, most=40) or ''!r} is not a CPU list")
            return None

    def cpus_either(self, path: str, mask: str) -> frozenset[int] | None:
        """The CPUs of a mask, or of the list beside it.

        The kernel writes both and they agree. Old recordings lack the lists, and those that were
        edited for hwloc, which reads the masks, may hold lists that are out of date.
        """
        text = self.text(mask, _MOST_LIST)
        if text is None:
            return self.cpus(path)
        try:
            return mask_set(text)
        except StackctlError:
            self.damaged(mask, f"{tidy(text, most=40) or ''!r} is not a CPU mask")
            return self.cpus(path)

    def damaged(self, path: str, why: str) -> None:
        """Note that a file says something impossible."""
        self._damaged.setdefault(path.rpartition("/")[2], []).append((path, why))

    def problems(self) -> tuple[Problem, ...]:
        """One problem for each kind of file that was damaged: 200 CPUs do not make 200."""
        found = []
        for kind, files in sorted(self._damaged.items()):
            path, why = files[0]
            more = f"; {len(files) - 1} more like it" if len(files) > 1 else ""
            found.append(
                Problem(
                    code="file-damaged", what=f"{kind} is not usable", why=f"{path}: {why}{more}"
                )
            )
        return tuple(found)
