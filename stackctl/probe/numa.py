"""NUMA nodes from /sys/devices/system/node."""

from __future__ import annotations

import re

import msgspec

from stackctl.errors import StackctlError
from stackctl.probe.fact_reader import FactReader, cpu_set, sanitize
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import NumaNode

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
    columns = _columns(reader, numbers)
    left_out = gpu_nodes(reader)
    sets = _cpu_sets(reader, [number for number in numbers if number not in left_out])
    nodes = tuple(
        NumaNode(
            id=number,
            cpus=CpuList(cpus if online is None else cpus & online),
            memory_bytes=_memory(reader, number),
            distances=_distances(reader, f"{_NODE}/node{number}/distance", columns, list(sets)),
        )
        for number, cpus in sets.items()
    )
    # With nodes of GPU memory the sums differ, because the total includes that memory.
    return nodes if left_out else _plausible(reader, nodes, total_bytes, online)


def _plausible(
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
        cpus = _cpus(reader, folder)
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


def _cpus(reader: FactReader, folder: str) -> frozenset[int] | None:
    cpus = reader.cpus_from_mask_or_list(f"{folder}/cpulist", f"{folder}/cpumap")
    if cpus is not None:
        return cpus
    # The folder also holds links to its CPUs.
    return reader.numbers(f"{folder}/cpu") or None


def _memory(reader: FactReader, number: int, kind: str = "Total") -> int | None:
    text = reader.text(f"{_NODE}/node{number}/meminfo") or ""
    line = rf"^Node\s+[0-9]+\s+Mem{kind}:\s+([0-9]{{1,14}})\s+kB\s*$"
    found = re.search(line, text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _columns(reader: FactReader, numbers: list[int]) -> list[int]:
    """Return the nodes in the order of a row of distances: all online ones, also without folder."""
    text = reader.text(f"{_NODE}/online")
    try:
        listed = sorted(cpu_set(text)) if text is not None else []
    except StackctlError:
        listed = []
    return listed if set(numbers) < set(listed) else numbers


def gpu_nodes(reader: FactReader) -> frozenset[int]:
    """Return the nodes that are the memory of a GPU (POWER9 and Grace), by NVIDIA's driver."""
    found = set()
    for path in reader.machine.glob("/proc/driver/nvidia/gpus/*/numa_status"):
        match = _GPU_NODE.search(reader.text(path) or "")
        if match:
            found.add(int(match[1]))
    return frozenset(found)


def gpu_free(reader: FactReader) -> int:
    """Return the free bytes of GPU memory that the kernel counts as available to programs."""
    return sum(_memory(reader, number, "Free") or 0 for number in gpu_nodes(reader))


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
