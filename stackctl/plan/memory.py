"""The memory budget: an engine's need compared with the limit of a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.engines.protocol import Footprint
from stackctl.plan import claimed_resources
from stackctl.quantity import format_bytes
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Claim, MemoryBudget, Placement

_GIB = 2**30


@dataclass(frozen=True)
class UsableMemory:
    """Bytes that a stack may use (None: unknown), their derivation as text, and the pool's name.

    ``claimed`` are the bytes that other stacks claim of the pool.
    """

    bytes: int | None
    why: str
    pool: str = "memory"
    claimed: int = 0


def memory_limit(host: Host, placement: Placement, claims: Sequence[Claim] = ()) -> UsableMemory:
    """Return the main memory that a service may use.

    This is the memory of the machine (or of the bound nodes, or of this process's cgroup), less 5 %
    for the system (between 0.5 and 8 GiB) and less the claims of other stacks. The free memory does
    not count, because an unchanged stack must get the same plan while it runs.
    """
    total, of = host.memory.total_bytes, "memory"
    claimed = claimed_resources.claimed_memory(claims)
    if placement.policy == "bind" and placement.mems is not None:
        wanted = placement.mems
        sizes = [node.memory_bytes for node in host.cpu.numa if node.id in wanted]
        if sizes and all(size is not None for size in sizes):
            total, of = sum(size or 0 for size in sizes), f"memory of node {placement.mems}"
            claimed = claimed_resources.claimed_memory(claims, wanted)
    if host.memory.limit_bytes is not None and (total is None or host.memory.limit_bytes < total):
        total, of = host.memory.limit_bytes, "the cgroup's limit"
        # The cgroup's limit holds for all stacks of this user, on whichever node.
        claimed = claimed_resources.claimed_memory(claims)
    if total is None:
        return UsableMemory(None, "memory size unknown")
    kept = min(8 * _GIB, max(_GIB // 2, total // 20))
    why = f"{format_bytes(total)} {of}, {format_bytes(kept)} kept free"
    if claimed:
        why += f", {format_bytes(claimed)} for other stacks"
    return UsableMemory(max(0, total - kept - claimed), why, claimed=claimed)


def gpu_limit(
    gpus: Sequence[Gpu], reserve_bytes: int, claims: Sequence[Claim] = ()
) -> UsableMemory:
    """Return the memory that a stack may use on each of these GPUs: the least of all."""
    names = "each GPU of " if len(gpus) > 1 else "GPU "
    names += ",".join(str(gpu.index) for gpu in gpus)
    limits: list[UsableMemory] = []
    for gpu in gpus:
        if gpu.memory_bytes is None:
            return UsableMemory(None, f"memory of GPU {gpu.index} unknown", names)
        claimed = claimed_resources.claimed_gpu_bytes(claims, gpu.index)
        why = f"{format_bytes(gpu.memory_bytes)}, {format_bytes(reserve_bytes)} kept free"
        if claimed:
            why += f", {format_bytes(claimed)} for other stacks"
        left = max(0, gpu.memory_bytes - reserve_bytes - claimed)
        limits.append(UsableMemory(left, why, names, claimed))
    return min(limits, key=lambda limit: limit.bytes or 0)


def memory_budget(footprint: Footprint, limit: UsableMemory) -> MemoryBudget:
    """Compare a footprint with a limit."""
    total = footprint.weights_bytes + footprint.kv_bytes + footprint.compute_bytes
    return MemoryBudget(
        pool=limit.pool,
        weights_bytes=footprint.weights_bytes,
        kv_bytes=footprint.kv_bytes,
        compute_bytes=footprint.compute_bytes,
        cache_bytes=footprint.cache_bytes,
        total_bytes=total,
        limit_bytes=limit.bytes,
        headroom_bytes=None if limit.bytes is None else limit.bytes - total,
        basis="measured" if footprint.measured else "estimated",
    )
