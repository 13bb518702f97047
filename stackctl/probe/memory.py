"""Main memory, and what the cgroup of this process leaves of it."""

from __future__ import annotations

import re

import msgspec

from stackctl.probe.reading import Reader
from stackctl.values.host import Memory, NumaNode, Problem

_CGROUP = "/sys/fs/cgroup"
#: Version 1 says "no limit" with the largest multiple of a page below 2**63.
_NO_LIMIT = 2**62
#: systemd nests units a few levels deep; the kernel's default limit is far above that.
_MOST_LEVELS = 64


def probe_memory(reader: Reader, problems: list[Problem]) -> Memory:
    """Read sizes and limits; channels and speed need other sources and stay unknown."""
    text = reader.text("/proc/meminfo") or ""
    total = _kib(text, "MemTotal")
    if total is None:
        problems.append(
            Problem(what="memory size is unknown", why="/proc/meminfo has no usable MemTotal")
        )
    pages = reader.text("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(always|madvise|never)\]", pages)
    return Memory(
        total_bytes=total,
        available_bytes=_kib(text, "MemAvailable"),
        limit_bytes=_limit(reader),
        transparent_hugepages=chosen[1] if chosen else None,
    )


def reconcile(
    nodes: tuple[NumaNode, ...], total: int | None, problems: list[Problem]
) -> tuple[NumaNode, ...]:
    """NUMA nodes whose memory adds up to the machine's, or is unknown.

    Some virtual machines give a node only the memory that it had at boot. More than the total is
    right: a container may be shown its own share as the total.
    """
    sizes = [node.memory_bytes for node in nodes if node.memory_bytes is not None]
    if total is None or len(sizes) != len(nodes) or not nodes or sum(sizes) >= 0.9 * total:
        return nodes
    if len(nodes) == 1:
        return (msgspec.structs.replace(nodes[0], memory_bytes=total),)
    problems.append(
        Problem(
            what="memory of the NUMA nodes is unknown",
            why=f"they hold {sum(sizes)} bytes together, the machine has {total}",
        )
    )
    return tuple(msgspec.structs.replace(node, memory_bytes=None) for node in nodes)


def _kib(text: str, name: str) -> int | None:
    match = re.search(rf"^{name}:\s+([0-9]{{1,14}})\s+kB\s*$", text, re.MULTILINE)
    return int(match[1]) * 1024 or None if match else None


def _limit(reader: Reader) -> int | None:
    """The smallest limit from this process's cgroup up to the root."""
    found: list[int] = []
    for line in (reader.text("/proc/self/cgroup") or "")[:65536].splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            # With version 1 beside it, version 2 has a folder of its own.
            for root in (_CGROUP, f"{_CGROUP}/unified"):
                found += _limits(reader, root, path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(reader, f"{_CGROUP}/memory", path, "memory.limit_in_bytes")
    return min(found, default=None)


def _limits(reader: Reader, root: str, path: str, name: str) -> list[int]:
    parts = [part for part in path.split("/") if part]
    if ".." in parts or len(parts) > _MOST_LEVELS:
        # Seen from inside a cgroup namespace, an outer cgroup starts with "..": not visible here.
        parts = []
    found = []
    for depth in range(len(parts), -1, -1):
        text = (reader.text("/".join([root, *parts[:depth], name])) or "").strip()
        if re.fullmatch("[0-9]{1,19}", text) and 0 < int(text) < _NO_LIMIT:
            found.append(int(text))
    return found
