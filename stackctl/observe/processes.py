"""What the kernel says of an engine's processes: time on processors, memory by node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stackctl.machine.files import Machine
from stackctl.values.cpulist import parse_cpulist
from stackctl.values.diagnosis import CpuTime, NodePages

#: More processes than an engine has; a fault in the walk must not go on for ever.
_MOST = 4096
_SCHED = re.compile(r"(\d{1,19}) (\d{1,19}) \d+\s*")
_PAGES = re.compile(r"\bN(\d{1,6})=(\d{1,15})\b")
_SIZE = re.compile(r"\bkernelpagesize_kB=(\d{1,9})\b")
#: The share of the time from which a thread is busy.
_BUSY = 0.25


@dataclass(frozen=True)
class Threads:
    """Nanoseconds that each thread ran and waited for a processor since it began."""

    spent: Mapping[str, tuple[int, int]]


def below(machine: Machine, pid: int) -> tuple[int, ...]:
    """All descendants of a process, nearest first."""
    found, pending = list[int](), [pid]
    while pending and len(found) < _MOST:
        for path in machine.glob(f"/proc/{pending.pop(0)}/task/*/children"):
            words = (machine.read(path) or "").split()
            children = [int(word) for word in words if word.isdecimal()]
            found += children
            pending += children
    return tuple(found)


def threads(machine: Machine, pids: Iterable[int]) -> Threads:
    """What every thread of these processes has spent."""
    spent = {}
    for pid in pids:
        for path in machine.glob(f"/proc/{pid}/task/*/schedstat"):
            if match := _SCHED.fullmatch(machine.read(path) or ""):
                spent[path] = (int(match[1]), int(match[2]))
    return Threads(spent)


def cpu_time(before: Threads, after: Threads, interval_s: float, allowed: int | None) -> CpuTime:
    """What came between two looks; threads that began or ended in between count where known."""
    spans = []
    for path, (ran, waited) in after.spent.items():
        ran_before, waited_before = before.spent.get(path, (0, 0))
        spans.append((max(0, ran - ran_before) / 1e9, max(0, waited - waited_before) / 1e9))
    return CpuTime(
        interval_s=interval_s,
        ran_s=sum(ran for ran, _ in spans),
        waited_s=sum(waited for _, waited in spans),
        threads=len(spans),
        # One that waits for a core wants to be busy too.
        busy=sum(ran + waited >= _BUSY * interval_s for ran, waited in spans),
        allowed=allowed,
    )


def allowed_cpus(machine: Machine, pid: int) -> int | None:
    """How many CPUs a process may use."""
    status = machine.read(f"/proc/{pid}/status") or ""
    match = re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", status, re.MULTILINE)
    return len(parse_cpulist(match[1])) if match else None


def pages(machine: Machine, pids: Iterable[int]) -> tuple[NodePages, ...]:
    """Bytes by memory node, of all these processes; empty where they may not be asked."""
    nodes: dict[int, int] = {}
    for pid in pids:
        for node, count in node_bytes(machine.read(f"/proc/{pid}/numa_maps") or "").items():
            nodes[node] = nodes.get(node, 0) + count
    return tuple(NodePages(node=node, bytes=nodes[node]) for node in sorted(nodes))


def node_bytes(text: str) -> dict[int, int]:
    """Bytes by memory node in a text of numa_maps: ``N0=12 kernelpagesize_kB=4``, one range a
    line."""
    nodes: dict[int, int] = {}
    for line in text.splitlines():
        size = _SIZE.search(line)
        for node, count in _PAGES.findall(line):
            bytes_ = int(count) * (int(size[1]) if size else 4) * 1024
            nodes[int(node)] = nodes.get(int(node), 0) + bytes_
    return nodes
