"""Main memory: NUMA nodes, sizes, speed, and the limit that the cgroups of this process set."""

from __future__ import annotations

import re

import msgspec

from stackctl.errors import StackctlError
from stackctl.probe import dmi
from stackctl.probe.cgroup import cgroup_folders
from stackctl.probe.fact_reader import FactReader, cpu_set, sanitize
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Bandwidth, Cpu, HugePages, Memory, NumaNode

_DMI = "/sys/firmware/dmi/tables/DMI"
#: cgroup version 1 shows "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 2**62
_NODE = "/sys/devices/system/node"
_GPU_NODE = re.compile(r"^Node:\s*([0-9]{1,5})\s*$", re.MULTILINE)


def probe_numa(
    reader: FactReader, online: frozenset[int] | None, total_bytes: int | None
) -> tuple[NumaNode, ...]:
    """Return the NUMA nodes, without nodes that are the memory of a GPU.

    If the kernel shows no nodes, one node has all CPUs and memory. Empty if the layout is unknown.
    The memory of the nodes is None if its sum is not that of the machine, ``total_bytes``.
    """
    numbers = sorted(reader.numbers(f"{_NODE}/node"))
    if not numbers:
        if not online:
            return ()
        return (NumaNode(id=0, cpus=CpuList(online), memory_bytes=total_bytes),)
    columns = _node_columns(reader, numbers)
    left_out = _gpu_nodes(reader)
    sets = _cpu_sets(reader, [number for number in numbers if number not in left_out])
    nodes = tuple(
        NumaNode(
            id=number,
            cpus=CpuList(cpus if online is None else cpus & online),
            memory_bytes=_node_memory(reader, number),
            distances=_distances(reader, f"{_NODE}/node{number}/distance", columns, list(sets)),
        )
        for number, cpus in sets.items()
    )
    # With nodes of GPU memory the sums differ, because the total includes that memory.
    return nodes if left_out else _plausible_nodes(reader, nodes, total_bytes, online)


def _plausible_nodes(
    reader: FactReader,
    nodes: tuple[NumaNode, ...],
    total: int | None,
    online: frozenset[int] | None,
) -> tuple[NumaNode, ...]:
    """Return NUMA nodes whose memory adds up to the machine's, or is None.

    Some virtual machines give a node only the memory that it had at boot. A sum above the total is
    accepted, because a container may be shown its own share as the total.
    """
    sizes = [node.memory_bytes for node in nodes if node.memory_bytes is not None]
    if total is None or len(sizes) != len(nodes) or not nodes or sum(sizes) >= 0.9 * total:
        return nodes
    if len(nodes) == 1:
        if online and nodes[0].cpus != CpuList(online):
            # Other nodes are offline or hidden, with the rest of the memory.
            return nodes
        return (msgspec.structs.replace(nodes[0], memory_bytes=total),)
    reader.note_unknown(
        "numa-memory-unknown",
        "memory of the NUMA nodes is unknown",
        f"they hold {sum(sizes)} bytes together, the machine has {total}",
    )
    return tuple(msgspec.structs.replace(node, memory_bytes=None) for node in nodes)


def _cpu_sets(reader: FactReader, numbers: list[int]) -> dict[int, frozenset[int]]:
    """Return the CPUs of each node, without nodes that repeat CPUs; empty if a list is missing."""
    sets: dict[int, frozenset[int]] = {}
    covered: set[int] = set()
    overlapping: list[int] = []
    for number in numbers:
        folder = f"{_NODE}/node{number}"
        cpus = _node_cpus(reader, folder)
        if cpus is None:
            # A node with unknown CPUs must not count as a node without CPUs.
            reader.note_unknown(
                "numa-unknown", "NUMA layout is unknown", f"{folder}/cpulist cannot be read"
            )
            return {}
        if cpus & covered:
            overlapping.append(number)
            continue
        covered |= cpus
        sets[number] = cpus
    if overlapping:
        reader.note_unknown(
            "numa-overlap",
            "NUMA nodes overlap",
            f"nodes {CpuList(overlapping)} repeat CPUs of others (numa=fake, or damaged firmware "
            "tables) and are left out",
        )
    return sets


def _node_cpus(reader: FactReader, folder: str) -> frozenset[int] | None:
    cpus = reader.cpus_from_mask_or_list(f"{folder}/cpulist", f"{folder}/cpumap")
    if cpus is not None:
        return cpus
    # The folder also holds links to its CPUs.
    return reader.numbers(f"{folder}/cpu") or None


def _node_memory(reader: FactReader, number: int, kind: str = "Total") -> int | None:
    text = reader.text(f"{_NODE}/node{number}/meminfo") or ""
    line = rf"^Node\s+[0-9]+\s+Mem{kind}:\s+([0-9]{{1,14}})\s+kB\s*$"
    found = re.search(line, text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _node_columns(reader: FactReader, numbers: list[int]) -> list[int]:
    """Return the nodes in the order of a row of distances: all online ones, also without folder."""
    text = reader.text(f"{_NODE}/online")
    try:
        listed = sorted(cpu_set(text)) if text is not None else []
    except StackctlError:
        listed = []
    return listed if set(numbers) < set(listed) else numbers


def _gpu_nodes(reader: FactReader) -> frozenset[int]:
    """Return the nodes that are the memory of a GPU (POWER9 and Grace), by NVIDIA's driver."""
    found = set()
    for path in reader.machine.glob("/proc/driver/nvidia/gpus/*/numa_status"):
        match = _GPU_NODE.search(reader.text(path) or "")
        if match:
            found.add(int(match[1]))
    return frozenset(found)


def _gpu_free(reader: FactReader) -> int:
    """Return the free bytes of GPU memory that the kernel counts as available to programs."""
    return sum(_node_memory(reader, number, "Free") or 0 for number in _gpu_nodes(reader))


def _distances(
    reader: FactReader, path: str, columns: list[int], kept: list[int]
) -> tuple[int, ...]:
    text = reader.text(path)
    if text is None:
        return ()
    words = text.strip("\0 \t\r\n").split()
    if len(words) != len(columns) or not all(re.fullmatch("[0-9]{1,3}", word) for word in words):
        shown = sanitize(text, most=40) or ""
        reader.note_damaged(path, f"{shown!r} is not a distance to {len(columns)} nodes")
        return ()
    row = dict(zip(columns, map(int, words), strict=True))
    return tuple(row[number] for number in kept)


def total_memory(reader: FactReader) -> int | None:
    """Return the bytes of memory that the kernel counts, with those of some GPUs; None: unknown."""
    return _kib(reader, "MemTotal")


def probe_memory(reader: FactReader, cpu: Cpu, *, virtual: bool) -> Memory:
    """Read the sizes, limits, channels and speed of the main memory.

    In a virtual machine channels and speed stay unknown: it shares the memory of a machine that it
    cannot see, and the hypervisor makes up its firmware tables. ``virtual`` comes from the
    "hypervisor" flag of the processor, so a recording without that flag counts as real hardware.
    """
    total, available = _sizes(reader, cpu.numa)
    pages = reader.text("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(always|madvise|never)\]", pages)
    channels, speed, source = (None, None, None) if virtual else _channels(reader, cpu)
    peak = channels * 8 * speed * 1e6 if channels and speed else None
    return Memory(
        total_bytes=total,
        available_bytes=available,
        limit_bytes=_limit(reader),
        transparent_hugepages=chosen[1] if chosen else None,
        hugepages_free=_hugepages(reader),
        channels=channels,
        speed_mt_s=speed,
        bandwidth_bytes_s=Bandwidth(theoretical=peak),
        bandwidth_source=source if peak else None,
    )


def _sizes(reader: FactReader, nodes: tuple[NumaNode, ...]) -> tuple[int | None, int | None]:
    """Return total and available bytes, without the memory of GPUs, which the kernel adds to them.

    An unknown total is taken from the nodes; if they have none, it is a problem.
    """
    total, available = total_memory(reader), _kib(reader, "MemAvailable")
    sizes = [node.memory_bytes for node in nodes if node.memory_bytes is not None]
    if nodes and len(sizes) == len(nodes) and sum(sizes):
        if total is None:
            total = sum(sizes)
        elif _gpu_nodes(reader):
            total = min(total, sum(sizes))
            if available is not None:
                available = min(total, max(0, available - _gpu_free(reader)))
    if total is None:
        reader.note_unknown(
            "memory-size-unknown", "memory size is unknown", "/proc/meminfo has no usable MemTotal"
        )
    return total, available


def _channels(reader: FactReader, cpu: Cpu) -> tuple[int | None, int | None, str]:
    """Return channels, speed and their source: the firmware, else the table of families."""
    known = dmi.processor_family(cpu.model)
    sockets = cpu.sockets or 0
    table = reader.machine.read_bytes(_DMI)
    found = dmi.memory_modules(table) if table else ()
    channels = dmi.channels_in_use(found, known, sockets or 1)
    speed = dmi.common_speed(found)
    if (not channels or not speed) and known is not None and sockets:
        return (
            channels or known.channels * sockets,
            speed or known.speed,
            f"table: {known.name}",
        )
    return channels, speed, "dmi"


def _hugepages(reader: FactReader) -> tuple[HugePages, ...]:
    """Return the explicit huge pages of each size that is reserved."""
    found = []
    for path in reader.machine.glob("/sys/kernel/mm/hugepages/hugepages-*kB"):
        size = re.fullmatch(r"hugepages-([0-9]{1,9})kB", path.rpartition("/")[2])
        total = reader.number(f"{path}/nr_hugepages") if size else None
        if size and total:
            free = reader.number(f"{path}/free_hugepages") or 0
            found.append(HugePages(bytes=int(size[1]) * 1024, total=total, free=free))
    return tuple(sorted(found, key=lambda pages: pages.bytes))


def _kib(reader: FactReader, name: str) -> int | None:
    text = reader.text("/proc/meminfo") or ""
    match = re.search(rf"^{name}:\s+([0-9]{{1,14}})\s+kB\s*$", text, re.MULTILINE)
    return int(match[1]) * 1024 or None if match else None


def _limit(reader: FactReader) -> int | None:
    """Return the smallest limit in bytes from this process's cgroup to the root; None: no limit."""
    found: list[int] = []
    for version, folder in cgroup_folders(reader, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        text = (reader.text(f"{folder}/{name}") or "").strip()
        if re.fullmatch("[0-9]{1,19}", text) and 0 < int(text) < _NO_LIMIT:
            found.append(int(text))
    return min(found, default=None)
