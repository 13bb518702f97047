"""Kernel CPU lists such as ``0-13,16``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stackctl.errors import ExitCode, StackctlError

_ITEM = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7})/(\d{1,7}))?)?")
#: Linux supports at most 8192 CPUs (NR_CPUS on x86-64); a larger number is a damaged file.
_MOST = 65536
#: All items together may name each CPU a few times, so that a hostile list costs no time.
_MOST_NAMED = 4 * _MOST


def parse_cpulist(text: str) -> tuple[int, ...]:
    """Sorted CPU numbers of a kernel list, also in its ``first-last:used/group`` form.

    Raises StackctlError (exit 2) for anything else.
    """
    cpus: set[int] = set()
    named = 0
    items = text.strip().split(",")
    if len(items) > _MOST:
        raise StackctlError(
            "a CPU list of more items than there can be CPUs", exit_code=ExitCode.USAGE
        )
    for item in items:
        if not item.strip():
            continue
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise StackctlError(
                f"{text!r} is not a CPU list",
                hint="write it like 0-13,16",
                exit_code=ExitCode.USAGE,
            )
        first, last, used, group = (int(part) if part else None for part in match.groups())
        assert first is not None
        last = first if last is None else last
        if last < first or last >= _MOST or group == 0:
            raise StackctlError(
                f"{text!r} is not a CPU list",
                hint="write it like 0-13,16",
                exit_code=ExitCode.USAGE,
            )
        span = range(first, last + 1)
        named += len(span)
        if named > _MOST_NAMED:
            raise StackctlError("a CPU list that repeats CPUs", exit_code=ExitCode.USAGE)
        cpus.update(cpu for cpu in span if group is None or (cpu - first) % group < (used or 0))
    return tuple(sorted(cpus))


def format_cpulist(cpus: Iterable[int]) -> str:
    """The kernel's short form of a set of CPU numbers; empty for none."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
