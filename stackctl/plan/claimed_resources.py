"""The ledger: claims of stacks on the CPUs, memory and ports of this machine."""

from __future__ import annotations

from collections.abc import Sequence, Set

from stackctl.values.cpu_list import CpuList
from stackctl.values.plan import Claim, GpuShare, Plan


def claim_of(plan: Plan) -> Claim:
    """Return the claim of a plan. CPU stacks claim the cores that their threads run on."""
    # With several GPUs the memory budget of a plan is that of each GPU.
    gpus = tuple(
        GpuShare(index=int(gpu), bytes=plan.memory.total_bytes) for gpu in plan.placement.gpus
    )
    main = plan.host_memory if plan.placement.gpus else plan.memory
    bound = plan.placement.mems if plan.placement.policy == "bind" else None
    return Claim(
        stack=plan.stack,
        cpus=plan.placement.cpus or CpuList(),
        mems=bound or CpuList(),
        memory_bytes=main.total_bytes if main is not None else 0,
        gpus=gpus,
        port=plan.port,
        engine_port=plan.engine_port,
    )


def other_claims(claims: Sequence[Claim], stack: str) -> tuple[Claim, ...]:
    """Return the claims of all stacks but this one: a stack does not compete with itself."""
    return tuple(claim for claim in claims if claim.stack != stack)


def claimed_cpus(claims: Sequence[Claim]) -> frozenset[int]:
    """Return the CPUs that the claims take."""
    return frozenset(cpu for claim in claims for cpu in claim.cpus)


def claimed_gpu_bytes(claims: Sequence[Claim], index: int) -> int:
    """Return the bytes of one GPU's memory that the claims take."""
    return sum(share.bytes for claim in claims for share in claim.gpus if share.index == index)


def claimed_memory(claims: Sequence[Claim], nodes: Set[int] = frozenset()) -> int:
    """Return the bytes of main memory that the claims take, of these NUMA nodes if any are given.

    Memory that is not bound may be on any node, so it counts for each node.
    """
    return sum(
        claim.memory_bytes for claim in claims if not nodes or not claim.mems or claim.mems & nodes
    )


def port_owner(claims: Sequence[Claim], port: int) -> str | None:
    """Return the stack that claims a port; None if none does."""
    return next((claim.stack for claim in claims if port in (claim.port, claim.engine_port)), None)
