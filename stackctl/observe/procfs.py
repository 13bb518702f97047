"""Processes as the kernel shows them in /proc: children, threads, memory, and where pages are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stackctl.machine.files import Machine
from stackctl.values.cpulist import CpuList
from stackctl.values.seen import Kind, NodeBytes, Pages, Process

#: Ticks of a second in /proc (USER_HZ), on every architecture that engines are built for.
TICKS = 100
_KIB = 1024
#: address, policy, the rest; two policies have a space in their names (mm/mempolicy.c).
_AREA = re.compile(
    r"[0-9a-f]+ (?P<policy>weighted interleave\S*|prefer \(many\)\S*|\S+)(?P<rest>.*)"
)
_NODE = re.compile(r" N(\d+)=(\d+)")
_PAGE = re.compile(r" kernelpagesize_kB=(\d+)")
_FILE = re.compile(r" file=(\S+)")
_DELETED = " (deleted)"
#: Memory that processes share, by the names of its files.
_SHARED = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero")


@dataclass(frozen=True)
class Stat:
    """Of /proc/PID/stat: its parent, and its start in ticks since the machine's."""

    pid: int
    parent: int
    command: str
    start_ticks: int


@dataclass(frozen=True)
class Times:
    """How long a thread ran, and how long it waited for a CPU, in nanoseconds since it began."""

    computed_ns: int
    waited_ns: int


def processes(machine: Machine) -> dict[int, Stat]:
    """All processes that this user may see. One that ends meanwhile is left out."""
    found = {}
    for path in machine.glob("/proc/[0-9]*/stat"):
        stat = _stat(machine.read(path))
        if stat is not None:
            found[stat.pid] = stat
    return found


def one(machine: Machine, pid: int) -> Stat | None:
    """One process; None when it is gone."""
    return _stat(machine.read(f"/proc/{pid}/stat"))


def _stat(text: str | None) -> Stat | None:
    # The name may hold anything, also a bracket.
    before, _, after = (text or "").rpartition(")")
    pid, _, command = before.partition(" (")
    fields = after.split()
    try:
        return Stat(
            pid=int(pid),
            parent=int(fields[1]),
            command=command,
            start_ticks=int(fields[19]),
        )
    except (ValueError, IndexError):
        return None


def tree(stats: Mapping[int, Stat], root: int) -> tuple[int, ...]:
    """A process and all its descendants: in a container these are all of its processes."""
    children = defaultdict(list)
    for stat in stats.values():
        children[stat.parent].append(stat.pid)
    found, pending = [], [root] if root in stats else []
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += [child for child in sorted(children[pid]) if child not in found]
    return tuple(found)


def pairs(text: str | None) -> dict[str, str]:
    """A file of lines ``Name: value``, such as /proc/PID/status."""
    split = (line.partition(":") for line in (text or "").splitlines())
    return {name.strip(): value.strip() for name, colon, value in split if colon}


def words(text: str | None) -> tuple[str, ...] | None:
    """Texts that end with a zero byte, such as /proc/PID/cmdline; None when there are none."""
    return tuple(text.split("\0")[:-1]) if text else None


def times(machine: Machine, pid: int) -> dict[int, Times]:
    """What the scheduler says of each thread; empty where the kernel does not keep it."""
    found = {}
    for path in machine.glob(f"/proc/{pid}/task/[0-9]*/schedstat"):
        fields = (machine.read(path) or "").split()
        if len(fields) >= 2 and fields[0].isdecimal() and fields[1].isdecimal():
            found[int(path.split("/")[4])] = Times(int(fields[0]), int(fields[1]))
    return found


def all_times(machine: Machine, pids: Iterable[int]) -> dict[tuple[int, int], Times]:
    """The same of several processes, by process and thread."""
    return {(pid, tid): seen for pid in pids for tid, seen in times(machine, pid).items()}


def affinities(machine: Machine, pid: int) -> dict[int, CpuList]:
    """Return the CPUs that each thread may use, by its number."""
    found = {}
    for path in machine.glob(f"/proc/{pid}/task/[0-9]*/status"):
        cpus = pairs(machine.read(path)).get("Cpus_allowed_list")
        if cpus is not None:
            found[int(path.split("/")[4])] = CpuList.parse(cpus)
    return found


def memory(machine: Machine, stat: Stat, is_model: Callable[[str], bool]) -> Process:
    """What a process holds of memory, and on which nodes."""
    folder = f"/proc/{stat.pid}"
    status = pairs(machine.read(f"{folder}/status"))
    rollup = pairs(machine.read(f"{folder}/smaps_rollup"))
    # Older kernels do not take shares apart by kind: all of what is shared then counts.
    own = _both(rollup, "Pss_Anon", "Pss_Shmem") or _both(status, "RssAnon", "RssShmem")
    return Process(
        id=stat.pid,
        command=stat.command,
        own_bytes=own,
        file_bytes=_bytes(status.get("RssFile")),
        huge_bytes=_bytes(rollup.get("AnonHugePages")),
        locked_bytes=_bytes(status.get("VmLck")),
        pages=pages(machine.read(f"{folder}/numa_maps") or "", is_model),
    )


def pages(numa_maps: str, is_model: Callable[[str], bool]) -> tuple[Pages, ...]:
    """Bytes by kind, policy and node: the sums of /proc/PID/numa_maps (see numa(7)).

    Only pages that the process has touched are there.
    """
    sums: dict[tuple[Kind, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for line in numa_maps.splitlines():
        match, size = _AREA.match(line), _PAGE.search(line)
        if match is None or size is None:
            continue
        name = _FILE.search(match["rest"])
        key = _kind(unescape(name[1]) if name else None, is_model), match["policy"]
        for node, count in _NODE.findall(match["rest"]):
            sums[key][int(node)] += int(count) * int(size[1]) * _KIB
    return tuple(
        Pages(
            kind=kind,
            policy=policy,
            nodes=tuple(NodeBytes(node=node, bytes=held[node]) for node in sorted(held)),
        )
        for (kind, policy), held in sorted(sums.items())
    )


def by_node(machine: Machine, pids: Iterable[int]) -> tuple[NodeBytes, ...]:
    """Bytes of processes on each node, of whatever kind; empty where they may not be asked."""
    sums: dict[int, int] = defaultdict(int)
    for pid in pids:
        for part in pages(machine.read(f"/proc/{pid}/numa_maps") or "", below(())):
            for held in part.nodes:
                sums[held.node] += held.bytes
    return tuple(NodeBytes(node=node, bytes=sums[node]) for node in sorted(sums))


def deleted(maps: str, is_model: Callable[[str], bool]) -> frozenset[str]:
    """Files of the model that a process maps and that have no name any more, from /proc/PID/maps.

    Paths as the process sees them.
    """
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(_DELETED) and is_model(fields[5]):
            found.add(fields[5].removesuffix(_DELETED))
    return frozenset(found)


def below(inside: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path is one of these, or below one; also when its file was deleted."""

    def is_model(path: str) -> bool:
        path = path.removesuffix(_DELETED)
        return any(path == one or path.startswith(f"{one}/") for one in inside)

    return is_model


def unescape(text: str) -> str:
    """A path as /proc writes it: \\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _kind(path: str | None, is_model: Callable[[str], bool]) -> Kind:
    if path is None:
        return "anonymous"
    if is_model(path):
        return "model"
    return "shared" if path.startswith(_SHARED) else "file"


def _both(values: Mapping[str, str], one: str, other: str) -> int | None:
    first, second = _bytes(values.get(one)), _bytes(values.get(other))
    return None if first is None or second is None else first + second


def _bytes(text: str | None) -> int | None:
    """``1428 kB`` in bytes."""
    number = (text or "").removesuffix(" kB").strip()
    return int(number) * _KIB if number.isdecimal() else None
