"""Reader of facts in files: an absent file is None, a damaged file is None and a Problem."""

from __future__ import annotations

import glob
import re
from functools import lru_cache

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Problem, ProblemCode

#: Linux supports at most 8192 CPUs; a list that names far more in all is a damaged file.
_MOST_CPUS = 16384
#: The bytes that are read: an attribute of sysfs fits a page, a list of 8192 CPUs needs more. A
#: probe reads thousands of files, and hostile recordings of long ones must not take minutes.
_MOST_ATTRIBUTE = 4096
_MOST_LIST = 32768
#: A number of at most 18 digits fits a 64-bit integer, which JSON readers accept.
_NUMBER = re.compile(r"[0-9]{1,18}")
_WORD = re.compile(r"[0-9a-fA-F]{1,8}")


@lru_cache(maxsize=4096)
def cpu_set(text: str) -> frozenset[int]:
    """Return the CPUs of a kernel list such as "0-3,8", in bounded time.

    Raises:
        StackctlError: the text is not a list, or names too many CPUs.
    """
    found: set[int] = set()
    named = 0
    # Recordings of some machines hold whole pages, padded with NULs.
    for item in text.strip("\0 \t\r\n").split(","):
        part = CpuList.parse(item)
        named += max(1, len(part))
        if named > _MOST_CPUS:
            raise StackctlError("it names more CPUs than a machine can have")
        found.update(part)
    return frozenset(found)


@lru_cache(maxsize=4096)
def mask_set(text: str) -> frozenset[int]:
    """Return the CPUs of a kernel mask such as "00000001,0000000f".

    Raises:
        StackctlError: the text is not a mask.
    """
    words = text.strip("\0 \t\r\n").split(",")
    if len(words) > _MOST_CPUS // 32 or not all(_WORD.fullmatch(word) for word in words):
        raise StackctlError("it is not a CPU mask")
    mask = 0
    for word in words:
        mask = mask << 32 | int(word, 16)
    return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def sanitize(text: str, *, most: int = 200) -> str | None:
    """Return a text as one printable line of at most ``most`` characters; None if it is empty."""
    words = "".join(char if char.isprintable() else " " for char in text[: 4 * most]).split()
    return " ".join(words)[:most].strip() or None


class FactReader:
    """A reader of one machine's facts, which remembers the unknown facts and damaged files."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._unknown: list[Problem] = []
        self._damaged: dict[str, list[tuple[str, str]]] = {}

    def text(self, path: str, most: int = _MOST_ATTRIBUTE) -> str | None:
        """Return the text of a file; None if it is absent or the path cannot exist.

        Only the first ``most`` bytes of files in /sys are read.
        """
        if not path.isprintable() or len(path) > 4096:
            return None
        if path.startswith("/sys/"):
            return self.machine.read(path, most=most)
        return self.machine.read(path)

    def exists(self, path: str) -> bool:
        """Return True if a file or folder exists."""
        return bool(self.machine.glob(glob.escape(path)))

    def line(self, path: str) -> str | None:
        """Return the text of a file as one short line; None if it is absent or empty."""
        text = self.text(path)
        return None if text is None else sanitize(text)

    def number(self, path: str) -> int | None:
        """Return the number in a file, at least 0; None if it is absent or damaged.

        The kernel writes -1 for "unknown", which gives None too.
        """
        text = self.text(path)
        if text is None:
            return None
        text = text.strip("\0 \t\r\n")
        if text == "-1":
            return None
        if not _NUMBER.fullmatch(text):
            self.note_damaged(path, f"{sanitize(text, most=40) or ''!r} is not a number")
            return None
        return int(text)

    def cpus(self, path: str) -> frozenset[int] | None:
        """Return the CPUs of a list in a file; None if it is absent or damaged.

        An empty list gives an empty set, not None.
        """
        text = self.text(path, _MOST_LIST)
        if text is None:
            return None
        try:
            return cpu_set(text)
        except StackctlError:
            self.note_damaged(path, f"{sanitize(text, most=40) or ''!r} is not a CPU list")
            return None

    def cpus_from_mask_or_list(self, path: str, mask: str) -> frozenset[int] | None:
        """Return the CPUs of the file with a mask, else of the file ``path`` with a list.

        The kernel writes both and they agree. Old recordings lack the lists, and recordings that
        were edited for hwloc, which reads the masks, may hold outdated lists.
        """
        text = self.text(mask, _MOST_LIST)
        if text is None:
            return self.cpus(path)
        try:
            return mask_set(text)
        except StackctlError:
            self.note_damaged(mask, f"{sanitize(text, most=40) or ''!r} is not a CPU mask")
            return self.cpus(path)

    def numbers(self, path: str, below: str = "") -> frozenset[int]:
        """Return the numbers of the existing files ``PATH<number>BELOW``, such as 12 of cpu12."""
        pattern = re.compile(f"{re.escape(path)}([0-9]{{1,5}}){re.escape(below)}")
        found = map(pattern.fullmatch, self.machine.glob(f"{path}[0-9]*{below}"))
        return frozenset(int(match[1]) for match in found if match)

    def note_unknown(
        self, code: ProblemCode, what: str, why: str, *, fix: str | None = None
    ) -> None:
        """Record a fact that matters and that nothing shows."""
        self._unknown.append(Problem(code=code, what=what, why=why, fix=fix))

    def note_damaged(self, path: str, why: str) -> None:
        """Record that the content of a file is not possible."""
        self._damaged.setdefault(path.rpartition("/")[2], []).append((path, why))

    def problems(self) -> tuple[Problem, ...]:
        """Return the unknown facts, then one problem for each name of damaged files, however many
        CPUs have that file."""
        found = list(self._unknown)
        for kind, files in sorted(self._damaged.items()):
            path, why = files[0]
            more = f"; {len(files) - 1} more like it" if len(files) > 1 else ""
            found.append(
                Problem(
                    code="file-damaged", what=f"{kind} is not usable", why=f"{path}: {why}{more}"
                )
            )
        return tuple(found)
