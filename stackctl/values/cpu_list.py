"""Lists of CPUs or NUMA nodes, as the kernel writes them: ``0-13,16``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set

from stackctl.errors import ExitCode, StackctlError

_ITEM = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7})/(\d{1,7}))?)?")
#: Numbers from here on come from a damaged file: Linux supports at most 8192 CPUs (NR_CPUS on
#: x86-64).
_MOST = 65536
#: A list may name each CPU a few times, not more: a hostile list must not cost time.
_MOST_NAMED = 4 * _MOST


class CpuList(Set[int]):
    """A frozen set of CPU or node numbers, which iterates in their order.

    Its text is the kernel's short form, in JSON too; the empty text is the empty set.
    """

    __slots__ = ("_members", "_numbers")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        """Hold these numbers; they may repeat and be in any order."""
        self._members = frozenset(numbers)
        self._numbers = tuple(sorted(self._members))

    @classmethod
    def parse(cls, text: str) -> CpuList:
        """Read a kernel list, also in its ``first-last:used/group`` form.

        Raises:
            StackctlError: exit 2 if the text is not a CPU list.
        """
        cpus: set[int] = set()
        named = 0
        items = text.strip().split(",")
        if len(items) > _MOST:
            raise StackctlError(
                "a CPU list of more items than there can be CPUs", exit_code=ExitCode.USAGE
            )
        wrong = StackctlError(
            f"{text!r} is not a CPU list", hint="write it like 0-13,16", exit_code=ExitCode.USAGE
        )
        for item in filter(None, map(str.strip, items)):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise wrong
            first, last, used, group = (int(part) if part else None for part in match.groups())
            assert first is not None
            last = first if last is None else last
            if last < first or last >= _MOST or group == 0:
                raise wrong
            span = range(first, last + 1)
            named += len(span)
            if named > _MOST_NAMED:
                raise StackctlError("a CPU list that repeats CPUs", exit_code=ExitCode.USAGE)
            cpus.update(cpu for cpu in span if group is None or (cpu - first) % group < (used or 0))
        return cls(cpus)

    def __contains__(self, number: object) -> bool:
        """Return True for a member."""
        return number in self._members

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers in ascending order."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """Return the count of numbers."""
        return len(self._numbers)

    def __hash__(self) -> int:
        """Return the hash of the equal frozenset."""
        return hash(self._members)

    def __and__(self, other: Set[object]) -> CpuList:
        """Return the numbers that are in both lists."""
        return CpuList(number for number in self._numbers if number in other)

    def __or__(self, other: Iterable[int]) -> CpuList:  # type: ignore[override]
        """Return the numbers that are in at least one of the lists."""
        return CpuList((*self._numbers, *other))

    def __sub__(self, other: Set[object]) -> CpuList:
        """Return the numbers that are not in the other list."""
        return CpuList(number for number in self._numbers if number not in other)

    @property
    def first(self) -> int:
        """Return the smallest number of a list that is not empty."""
        return self._numbers[0]

    def __str__(self) -> str:
        """Return the kernel's short form, such as ``0-13,16``; empty for an empty list."""
        runs: list[list[int]] = []
        for number in self._numbers:
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

    def __repr__(self) -> str:
        """Return the expression that makes an equal list."""
        return f"CpuList.parse({str(self)!r})"
