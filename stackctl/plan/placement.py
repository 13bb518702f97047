"""Threads, CPUs and memory nodes from the topology."""

from __future__ import annotations

from dataclasses import dataclass

from stackctl.errors import ExitCode, StackctlError
from stackctl.values.cpulist import format_cpulist, parse_cpulist
from stackctl.values.host import Host
from stackctl.values.plan import Decision, Placement, Policy, Source
from stackctl.values.profile import PlacementWish, Profile

_DELEGATE = (
    "for user services: write [Service] Delegate=cpu cpuset io memory pids to "
    "/etc/systemd/system/user@.service.d/delegate.conf, then "
    "systemctl daemon-reload and log in again"
)


@dataclass(frozen=True)
class Placed:
    """Where it runs, with how many threads (and why; None when cores are unknown)."""

    placement: Placement
    threads: tuple[int, str] | None
    threads_batch: tuple[int, str] | None
    decisions: tuple[Decision, ...]


def place(host: Host, profile: Profile) -> Placed:
    """Choose CPUs, memory policy and thread counts.

    Raises:
        StackctlError: exit 2 for CPUs or nodes that the machine lacks, exit 6 when binding was
            asked for and the cpuset controller cannot be used.
    """
    wish = profile.placement
    nodes = _nodes(host, wish)
    cores = _cores(host, wish, nodes)
    smt = any(len(core) > 1 for core in cores)
    bound = wish.cpus is not None or wish.nodes is not None or wish.policy == "bind"
    cpuset_known = host.tools.cgroup_version is not None
    cpuset = "cpuset" in host.tools.cgroup_controllers
    if bound and cpuset_known and not cpuset:
        raise StackctlError(
            "the profile binds CPUs or memory nodes, and services here cannot use the cpuset "
            "controller",
            hint=_DELEGATE + "; or leave placement out",
            exit_code=ExitCode.HOST,
        )
    policy, why_policy = _policy(host, wish, nodes)
    cpus = (
        format_cpulist(core[0] for core in cores)
        if smt
        else format_cpulist(cpu for core in cores for cpu in core)
    )
    use_cpuset = bound or (smt and cpuset)
    placement = Placement(
        cpus=cpus or None,
        mems=format_cpulist(nodes) if nodes else None,
        policy=policy,
        cpuset=use_cpuset,
    )
    overridden = any(key.startswith("placement.") for key in profile.overrides)
    source: Source = "override" if overridden else "profile"
    decisions = (
        Decision(
            field="cpus",
            value=placement.cpus,
            reason=_why_cpus(bound, smt, cpuset, cpuset_known),
            source=source if wish.cpus is not None or wish.nodes is not None else "derived",
        ),
        Decision(
            field="memory-policy",
            value=policy,
            reason=why_policy,
            source=source if wish.policy != "auto" else "derived",
        ),
    )
    threads, batch = _threads(len(cores), smt)
    return Placed(placement, threads, batch, decisions)


def _nodes(host: Host, wish: PlacementWish) -> tuple[int, ...]:
    """Memory nodes to use; empty when the machine does not tell."""
    have = tuple(node.id for node in host.cpu.numa if node.memory_bytes != 0)
    if wish.nodes is None:
        return have
    wanted = parse_cpulist(str(wish.nodes))
    missing = [node for node in wanted if node not in have]
    if missing or not wanted:
        raise StackctlError(
            f"placement.nodes: this machine has no NUMA node {format_cpulist(missing)}".rstrip(),
            hint=f"nodes: {format_cpulist(have) or 'none known'}",
            exit_code=ExitCode.USAGE,
        )
    return wanted


def _cores(host: Host, wish: PlacementWish, nodes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The CPUs of each physical core that may be used; empty when unknown."""
    cpu = host.cpu
    allowed = set(parse_cpulist(cpu.allowed or cpu.online or ""))
    if not allowed and cpu.threads:
        allowed = set(range(cpu.threads))
    if wish.cpus is not None:
        wanted = set(parse_cpulist(str(wish.cpus)))
        if not wanted or not wanted <= allowed:
            raise StackctlError(
                f"placement.cpus: may not use CPU {format_cpulist(wanted - allowed)}".rstrip(),
                hint=f"CPUs: {format_cpulist(allowed)}",
                exit_code=ExitCode.USAGE,
            )
        allowed = wanted
    elif wish.nodes is not None or wish.policy == "bind":
        local = {c for node in cpu.numa if node.id in nodes for c in parse_cpulist(node.cpus)}
        allowed &= local
        if not allowed:
            raise StackctlError(
                "placement: the chosen NUMA nodes have no CPU",
                hint="set placement.cpus too",
                exit_code=ExitCode.USAGE,
            )
    if cpu.siblings:
        groups = (set(parse_cpulist(core)) & allowed for core in cpu.siblings)
        return tuple(tuple(sorted(group)) for group in groups if group)
    if cpu.cores and cpu.threads and cpu.cores < cpu.threads and len(allowed) == cpu.threads:
        # Which CPUs share a core is unknown: numbering first all cores, then siblings, is usual.
        return tuple((first,) for first in sorted(allowed)[: cpu.cores])
    return tuple((one,) for one in sorted(allowed))


def _policy(host: Host, wish: PlacementWish, nodes: tuple[int, ...]) -> tuple[Policy, str]:
    if wish.policy == "bind":
        return "bind", f"the profile binds memory to node {format_cpulist(nodes)}"
    if wish.nodes is not None and wish.policy == "auto":
        if len(nodes) == 1:
            return "bind", f"the profile names node {format_cpulist(nodes)}"
        return "interleave", "pages spread over the nodes the profile names: all their bandwidth"
    if wish.policy in ("default", "interleave"):
        return wish.policy, "the profile says so"
    if len([node for node in host.cpu.numa if node.memory_bytes]) > 1:
        return "interleave", f"pages spread over {len(nodes)} nodes: the bandwidth of all of them"
    return "default", "one NUMA node" if len(host.cpu.numa) == 1 else "NUMA nodes unknown"


def _why_cpus(bound: bool, smt: bool, cpuset: bool, cpuset_known: bool) -> str:
    if bound:
        return "bound as the profile says" + ("" if cpuset_known else " (cpuset not checked)")
    if smt and cpuset:
        return "one CPU of each core: hyperthreads slow generation down"
    if smt:
        return "one CPU of each core wanted, left to the scheduler: no cpuset controller"
    return "all allowed cores, left to the scheduler"


def _threads(cores: int, smt: bool) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Threads for generation and for prompts.

    Generation waits for memory, and one busy neighbour stalls all threads: 1 to 3 cores are left to
    the system (best on the reference machine: 13 to 14 of 16). Below 5 cores each one counts.
    """
    if cores == 0:
        return None, None
    kept = 0 if cores <= 4 else 1 if cores <= 8 else 2 if cores <= 32 else 3
    noun = "physical cores" if smt else "cores"
    why = f"{cores} {noun}, {kept} kept free for the system" if kept else f"all {cores} {noun}"
    return (cores - kept, why), (cores, f"prompts use all {cores} {noun}")
