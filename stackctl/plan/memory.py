"""The memory budget: what an engine takes against what a service may take."""

from __future__ import annotations

from stackctl.engines.engine import Footprint
from stackctl.quantity import format_bytes
from stackctl.values.cpulist import parse_cpulist
from stackctl.values.host import Host
from stackctl.values.plan import MemoryBudget, Placement

_GIB = 2**30


def memory_limit(host: Host, placement: Placement) -> tuple[int | None, str]:
    """Bytes that a service may use, and how that follows.

    All memory of the machine (of the bound nodes; of this process' cgroup), less 5 % for the system
    (between 0.5 and 8 GiB). What happens to be free now is no input: an unchanged stack must plan
    the same while it runs.
    """
    total, of = host.memory.total_bytes, "memory"
    if placement.policy == "bind" and placement.mems is not None:
        wanted = set(parse_cpulist(placement.mems))
        sizes = [node.memory_bytes for node in host.cpu.numa if node.id in wanted]
        if sizes and all(size is not None for size in sizes):
            total, of = sum(size or 0 for size in sizes), f"memory of node {placement.mems}"
    if host.memory.limit_bytes is not None and (total is None or host.memory.limit_bytes < total):
        total, of = host.memory.limit_bytes, "the cgroup's limit"
    if total is None:
        return None, "memory size unknown"
    kept = min(8 * _GIB, max(_GIB // 2, total // 20))
    return max(0, total - kept), f"{format_bytes(total)} {of}, {format_bytes(kept)} kept free"


def budget(footprint: Footprint, limit_bytes: int | None) -> MemoryBudget:
    """The footprint against the limit."""
    total = footprint.weights_bytes + footprint.kv_bytes + footprint.compute_bytes
    return MemoryBudget(
        weights_bytes=footprint.weights_bytes,
        kv_bytes=footprint.kv_bytes,
        compute_bytes=footprint.compute_bytes,
        total_bytes=total,
        limit_bytes=limit_bytes,
        headroom_bytes=None if limit_bytes is None else limit_bytes - total,
    )
