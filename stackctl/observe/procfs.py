"""Readers of /proc: child processes, threads, memory, and the nodes of pages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stackctl.machine.machine import Machine
from stackctl.values.cpu_list import CpuList
from stackctl.values.inspection import EngineProcess, NodeBytes, PageKind, Pages

#: Ticks per second in /proc (USER_HZ), the same on all architectures with engines.
TICKS = 100
_KIB = 1024
#: A line of numa_maps: address, policy, the rest. Two policies have a space in their names
#: (mm/mempolicy.c).
_AREA = re.compile(
    r"[0-9a-f]+ (?P<policy>weighted interleave\S*|prefer \(many\)\S*|\S+)(?P<rest>.*)"
)
_NODE = re.compile(r" N(\d+)=(\d+)")
_PAGE = re.compile(r" kernelpagesize_kB=(\d+)")
_FILE = re.compile(r" file=(\S+)")
_DELETED = " (deleted)"
#: The beginnings of the file names of shared memory.
_SHARED = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero")


@dataclass(frozen=True)
class ProcessStat:
    """Fields of /proc/PID/stat; the start is in ticks since the machine's boot."""

    pid: int
    parent: int
    command: str
    start_ticks: int


@dataclass(frozen=True)
class ThreadTimes:
    """The time that a thread ran and that it waited for a CPU, in nanoseconds since its start."""

    computed_ns: int
    waited_ns: int

    def since(self, earlier: ThreadTimes | None) -> ThreadTimes:
        """Return the times since an earlier sample; all times if the thread is new (None)."""
        if earlier is None:
            return self
        return ThreadTimes(
            max(0, self.computed_ns - earlier.computed_ns),
            max(0, self.waited_ns - earlier.waited_ns),
        )


#: The times of threads by process ID and thread ID.
TimesByThread = Mapping[tuple[int, int], ThreadTimes]


def processes(machine: Machine) -> dict[int, ProcessStat]:
    """Return all processes that this user may see, by their IDs. Skip those that end meanwhile."""
    found = {}
    for path in machine.glob("/proc/[0-9]*/stat"):
        stat = _stat(machine.read(path))
        if stat is not None:
            found[stat.pid] = stat
    return found


def read_stat(machine: Machine, pid: int) -> ProcessStat | None:
    """Return one process; None if it has ended."""
    return _stat(machine.read(f"/proc/{pid}/stat"))


def _stat(text: str | None) -> ProcessStat | None:
    # The name may hold any character, also a bracket.
    before, _, after = (text or "").rpartition(")")
    pid, _, command = before.partition(" (")
    fields = after.split()
    try:
        return ProcessStat(
            pid=int(pid),
            parent=int(fields[1]),
            command=command,
            start_ticks=int(fields[19]),
        )
    except (ValueError, IndexError):
        return None


def descendants(stats: Mapping[int, ProcessStat], root: int) -> tuple[int, ...]:
    """Return the IDs of a process and all its descendants; empty if it has ended.

    The descendants of a container's first process are all of its processes.
    """
    children = defaultdict(list)
    for stat in stats.values():
        children[stat.parent].append(stat.pid)
    found, pending = [], [root] if root in stats else []
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += [child for child in sorted(children[pid]) if child not in found]
    return tuple(found)


def parse_status(text: str | None) -> dict[str, str]:
    """Parse lines of the form ``Name: value``, as in /proc/PID/status."""
    split = (line.partition(":") for line in (text or "").splitlines())
    return {name.strip(): value.strip() for name, colon, value in split if colon}


def parse_nul_list(text: str | None) -> tuple[str, ...] | None:
    """Split texts that end with a zero byte, as in /proc/PID/cmdline; None without a text."""
    return tuple(text.split("\0")[:-1]) if text else None


def thread_times(machine: Machine, pids: Iterable[int]) -> TimesByThread:
    """Return the scheduler's times of the threads of processes; none if the kernel keeps none."""
    found = {}
    for pid in pids:
        for path in machine.glob(f"/proc/{pid}/task/[0-9]*/schedstat"):
            fields = (machine.read(path) or "").split()
            if len(fields) >= 2 and fields[0].isdecimal() and fields[1].isdecimal():
                times = ThreadTimes(int(fields[0]), int(fields[1]))
                found[pid, int(path.split("/")[4])] = times
    return found


def affinities(machine: Machine, pid: int) -> dict[int, CpuList]:
    """Return the CPUs that each thread may use, by its number."""
    found = {}
    for path in machine.glob(f"/proc/{pid}/task/[0-9]*/status"):
        cpus = parse_status(machine.read(path)).get("Cpus_allowed_list")
        if cpus is not None:
            found[int(path.split("/")[4])] = CpuList.parse(cpus)
    return found


def process_memory(
    machine: Machine, stat: ProcessStat, is_model: Callable[[str], bool]
) -> EngineProcess:
    """Return the memory of a process, and its nodes.

    ``is_model`` returns True for the path of a file of the model.
    """
    folder = f"/proc/{stat.pid}"
    status = parse_status(machine.read(f"{folder}/status"))
    rollup = parse_status(machine.read(f"{folder}/smaps_rollup"))
    # Older kernels do not split Pss by kind; there shared memory counts in full.
    own = _both(rollup, "Pss_Anon", "Pss_Shmem") or _both(status, "RssAnon", "RssShmem")
    return EngineProcess(
        id=stat.pid,
        command=stat.command,
        own_bytes=own,
        file_bytes=_bytes(status.get("RssFile")),
        huge_bytes=_bytes(rollup.get("AnonHugePages")),
        locked_bytes=_bytes(status.get("VmLck")),
        pages=numa_pages(machine.read(f"{folder}/numa_maps") or "", is_model),
    )


def numa_pages(numa_maps: str, is_model: Callable[[str], bool]) -> tuple[Pages, ...]:
    """Return bytes by kind, policy and node: the sums of /proc/PID/numa_maps (see numa(7)).

    The file lists only pages that the process has touched.
    """
    sums: dict[tuple[PageKind, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
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


def numa_bytes(machine: Machine, pids: Iterable[int]) -> tuple[NodeBytes, ...]:
    """Return the bytes of processes on each node; empty if their maps may not be read."""
    sums: dict[int, int] = defaultdict(int)
    for pid in pids:
        for part in numa_pages(machine.read(f"/proc/{pid}/numa_maps") or "", is_below(())):
            for held in part.nodes:
                sums[held.node] += held.bytes
    return tuple(NodeBytes(node=node, bytes=sums[node]) for node in sorted(sums))


def deleted_model_files(maps: str, is_model: Callable[[str], bool]) -> frozenset[str]:
    """Return the deleted files of the model that a process maps, from /proc/PID/maps.

    The paths are those in the process's mount namespace.
    """
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(_DELETED) and is_model(fields[5]):
            found.add(fields[5].removesuffix(_DELETED))
    return frozenset(found)


def is_below(inside: Sequence[str]) -> Callable[[str], bool]:
    """Return a test for paths: True for these paths and all below them.

    The test ignores the mark of a deleted file.
    """

    def is_model(path: str) -> bool:
        path = path.removesuffix(_DELETED)
        return any(path == one or path.startswith(f"{one}/") for one in inside)

    return is_model


def unescape(text: str) -> str:
    """Decode a path from /proc, where a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _kind(path: str | None, is_model: Callable[[str], bool]) -> PageKind:
    if path is None:
        return "anonymous"
    if is_model(path):
        return "model"
    return "shared" if path.startswith(_SHARED) else "file"


def _both(values: Mapping[str, str], one: str, other: str) -> int | None:
    first, second = _bytes(values.get(one)), _bytes(values.get(other))
    return None if first is None or second is None else first + second


def _bytes(text: str | None) -> int | None:
    """Return a size such as ``1428 kB`` in bytes; None if it is no size."""
    number = (text or "").removesuffix(" kB").strip()
    return int(number) * _KIB if number.isdecimal() else None
