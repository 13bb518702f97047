"""Main memory, and the limit that the cgroups of this process set."""

from __future__ import annotations

import re

from stackctl.probe import dmi
from stackctl.probe.cgroup import cgroup_folders
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.numa import gpu_free, gpu_nodes
from stackctl.values.host import Bandwidth, Cpu, HugePages, Memory, NumaNode

_DMI = "/sys/firmware/dmi/tables/DMI"
#: cgroup version 1 shows "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 2**62


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
        elif gpu_nodes(reader):
            total = min(total, sum(sizes))
            if available is not None:
                available = min(total, max(0, available - gpu_free(reader)))
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
