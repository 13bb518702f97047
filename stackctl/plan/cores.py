"""The physical cores that a stack may use: allowed to it, of the right kind, and not claimed."""

from __future__ import annotations

from collections.abc import Sequence, Set

from stackctl.errors import ExitCode, StackctlError
from stackctl.plan import claimed_resources
from stackctl.values.claim import Claim
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Host
from stackctl.values.profile import PlacementRequest

#: The CPUs of each core.
Cores = tuple[tuple[int, ...], ...]


def usable_cores(
    host: Host, wish: PlacementRequest, nodes: tuple[int, ...], claims: Sequence[Claim]
) -> tuple[Cores, bool]:
    """Return the CPUs of each usable physical core, and True if claims took some away.

    If other stacks claim every core, all are used: a lack of memory kills a stack, but shared cores
    only slow it down.

    Raises:
        StackctlError: exit 2 for CPUs that may not be used, or NUMA nodes without CPUs.
    """
    cpu = host.cpu
    allowed = set(cpu.allowed or cpu.online or ())
    if not allowed and cpu.threads:
        allowed = set(range(cpu.threads))
    if wish.cpus is not None:
        wanted = CpuList.parse(str(wish.cpus))
        if not wanted or not wanted <= allowed:
            raise StackctlError(
                f"placement.cpus: may not use CPU {wanted - allowed}".rstrip(),
                hint=f"CPUs: {CpuList(allowed)}",
                exit_code=ExitCode.USAGE,
            )
        # CPUs that the user names are used even if other stacks claim them.
        return _grouped(host, wanted), False
    if wish.nodes is not None or wish.policy == "bind":
        allowed &= {c for node in cpu.numa if node.id in nodes for c in node.cpus}
        if not allowed:
            raise StackctlError(
                "placement: the chosen NUMA nodes have no CPU",
                hint="set placement.cpus too",
                exit_code=ExitCode.USAGE,
            )
    if cpu.kinds:
        # Hybrid processors: the slowest thread sets the pace, so only the fastest kind is used.
        allowed = (allowed & set(cpu.kinds[0].cpus)) or allowed
    cores = _grouped(host, allowed)
    # One claimed CPU makes its whole core claimed, even a CPU that this process may not use.
    taken = _with_siblings(host, claimed_resources.claimed_cpus(claims))
    free = tuple(core for core in cores if not taken & set(core))
    if not free:
        return cores, False
    return free, len(free) < len(cores)


def cores_of_one_node(
    host: Host, wish: PlacementRequest, nodes: tuple[int, ...], cores: Cores, engine: str
) -> tuple[tuple[int, ...], Cores]:
    """Return the node that has most of the cores, and its cores, for an engine that uses one node.

    Raises:
        StackctlError: exit 2 if the profile names several nodes.
    """
    if wish.nodes is not None:
        raise StackctlError(
            f"placement.nodes: {engine} on the CPU uses one NUMA node, not {CpuList(nodes)}",
            hint=f'--set placement.nodes="{nodes[0]}"',
            exit_code=ExitCode.USAGE,
        )
    best: int = nodes[0]
    most: Cores = ()
    for node in host.cpu.numa:
        there = tuple(core for core in cores if node.cpus & set(core))
        if node.id in nodes and len(there) > len(most):
            best, most = node.id, there
    return (best,), most or cores


def claimants(host: Host, chosen: Cores, claims: Sequence[Claim]) -> tuple[str, ...]:
    """Return the stacks that claim CPUs of the chosen cores."""
    mine = _with_siblings(host, {cpu for core in chosen for cpu in core})
    return tuple(claim.stack for claim in claims if claim.cpus & mine)


def _with_siblings(host: Host, cpus: Set[int]) -> set[int]:
    """Return the CPUs, and all CPUs that share a core with them."""
    return set(cpus).union(*(core for core in host.cpu.siblings if core & cpus))


def _grouped(host: Host, allowed: Set[int]) -> Cores:
    cpu = host.cpu
    if cpu.siblings:
        groups = (core & allowed for core in cpu.siblings)
        return tuple(tuple(group) for group in groups if group)
    if cpu.cores and cpu.threads and cpu.cores < cpu.threads and len(allowed) == cpu.threads:
        # The siblings are unknown. Usually the first CPUs of all cores have the lowest numbers.
        return tuple((first,) for first in sorted(allowed)[: cpu.cores])
    return tuple((one,) for one in sorted(allowed))
