"""Threads, CPUs, memory nodes and GPUs from the topology and what other stacks leave over."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from stackctl.engines import engine as find_engine
from stackctl.engines import uses_gpu
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan import ledger
from stackctl.values.claim import Claim
from stackctl.values.cpulist import format_cpulist, parse_cpulist
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Decision, Placement, Policy, Source
from stackctl.values.profile import PlacementWish, Profile

_DELEGATE = (
    "for user services: stackctl provision --only cpuset, then log in again (by hand: write "
    "[Service] Delegate=cpu cpuset io memory pids to "
    "/etc/systemd/system/user@.service.d/10-stackctl-delegate.conf, then systemctl daemon-reload)"
)
#: A GPU worker feeds the GPU: more cores than this do not help it.
_GPU_WORKER_CORES = 2
#: Up to here generation uses every core; of more only a share.
_MANY_CORES = 60
_MANY_SHARE = 0.63

Cores = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placed:
    """Where it runs, and with how many threads (and why; None when cores are unknown)."""

    placement: Placement
    threads: tuple[int, str] | None
    threads_batch: tuple[int, str] | None
    gpus: tuple[Gpu, ...]
    decisions: tuple[Decision, ...]


def place(host: Host, profile: Profile, claims: Sequence[Claim] = ()) -> Placed:
    """Choose GPUs, CPUs, memory policy and the number of threads.

    Raises:
        StackctlError: exit 2 for CPUs, nodes or GPUs that the machine lacks, exit 6 when binding
            was asked for and the cpuset controller cannot be used.
    """
    wish, engine = profile.placement, find_engine(profile.engine)
    gpus, why_gpus = _gpus(host, profile, claims)
    nodes = _nodes(host, wish)
    cores, claimed = _cores(host, wish, nodes, claims)
    if one_node := engine.one_node_on_cpu and not gpus and len(nodes) > 1:
        nodes, cores = _one_node(host, wish, nodes, cores, engine.title)
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
    worker_only = bool(gpus) and not (engine.splits_experts and wish.cpu_experts is not None)
    if worker_only:
        chosen, why_cpus = _near_gpu(host, cores, gpus)
        if wish.cpus is not None:
            # CPUs that the user names are used as they are.
            chosen, why_cpus = cores, "bound as asked"
        threads = batch = None
        if engine.threads_options is not None and chosen:
            threads = batch = (len(chosen), "the GPU does the work")
    else:
        chosen, why_cpus, (threads, batch) = _computing(cores, smt, bound, claimed)
    policy, why_policy = _policy(host, wish, nodes)
    if one_node:
        policy = "bind"
        why_policy = f"{engine.title} keeps a worker's memory on one node: {nodes[0]}"
    if worker_only and wish.policy == "auto" and wish.nodes is None and len(nodes) > 1:
        nodes, policy, why_policy = _beside_gpus(nodes, gpus)
    shared = _shared_with(host, chosen, claims)
    if shared:
        why_cpus += ", " + sharing(shared)
    use_cpuset = bound or (cpuset and bool(chosen) and (smt or len(chosen) < len(cores)))
    if not use_cpuset and chosen:
        why_cpus += ", left to the scheduler"
        why_cpus += "" if cpuset or not cpuset_known else ": no cpuset controller"
    placement = Placement(
        cpus=format_cpulist(core[0] for core in chosen) or None,
        mems=format_cpulist(nodes) if nodes else None,
        gpus=tuple(str(gpu.index) for gpu in gpus),
        policy=policy,
        cpuset=use_cpuset,
        shared_with=shared,
    )
    decisions = _decisions(profile, placement, why_gpus, why_cpus, why_policy)
    return Placed(placement, threads, batch, gpus, decisions)


def _decisions(
    profile: Profile, placement: Placement, why_gpus: str, why_cpus: str, why_policy: str
) -> tuple[Decision, ...]:
    """Return the decisions on GPUs (if any), CPUs and memory policy, with their sources."""
    wish = profile.placement
    overridden = any(key.startswith("placement.") for key in profile.overrides)
    asked: Source = "override" if overridden else "profile"
    asked_cpus = wish.cpus is not None or wish.nodes is not None
    cpus = Decision(
        field="cpus",
        value=placement.cpus,
        reason=why_cpus,
        source=asked if asked_cpus else "derived",
    )
    policy = Decision(
        field="memory-policy",
        value=placement.policy,
        reason=why_policy,
        source=asked if wish.policy != "auto" else "derived",
    )
    if not placement.gpus:
        return cpus, policy
    gpus = Decision(
        field="gpus",
        value=",".join(placement.gpus),
        reason=why_gpus,
        source=asked if wish.gpus is not None else "derived",
    )
    return gpus, cpus, policy


def _gpus(host: Host, profile: Profile, claims: Sequence[Claim]) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs to use, and why.

    Those that the profile asks for; if it names none, the one with most room for an engine that is
    made for GPUs, and none for another.
    """
    wish = profile.placement.gpus
    if not uses_gpu(profile):
        return (), ""
    if not host.gpus:
        raise StackctlError(
            f"{profile.name} needs a GPU, and this machine shows none",
            hint="stackctl probe shows what it sees; a CPU profile: stackctl profiles",
            exit_code=ExitCode.HOST,
        )
    if wish is None:
        roomy = max(
            host.gpus,
            key=lambda gpu: (gpu.memory_bytes or 0) - ledger.claimed_gpu_bytes(claims, gpu.index),
        )
        return (roomy,), _named((roomy,)) + (": most room of all" if len(host.gpus) > 1 else "")
    if str(wish) == "all":
        count, why = find_engine(profile.engine).usable_gpus(len(host.gpus))
        used = host.gpus[:count]
        return used, _named(used) + (f"; {why}" if why else "")
    wanted = parse_cpulist(str(wish))
    found = tuple(gpu for gpu in host.gpus if gpu.index in wanted)
    if len(found) != len(wanted) or not wanted:
        raise StackctlError(
            f"placement.gpus: this machine has no GPU {wish}",
            hint="GPUs: " + ", ".join(str(gpu.index) for gpu in host.gpus),
            exit_code=ExitCode.USAGE,
        )
    return found, _named(found)


def _named(gpus: Sequence[Gpu]) -> str:
    return ", ".join(gpu.name or "unknown GPU" for gpu in gpus)


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


def _cores(
    host: Host, wish: PlacementWish, nodes: tuple[int, ...], claims: Sequence[Claim]
) -> tuple[Cores, bool]:
    """The CPUs of each physical core that may be used, and whether claims took some away.

    Where other stacks claim every core, all are used as if none did: too little memory kills, while
    shared cores only slow down.
    """
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
        # What the user names is used, whoever else claims it.
        return _grouped(host, wanted), False
    if wish.nodes is not None or wish.policy == "bind":
        allowed &= {c for node in cpu.numa if node.id in nodes for c in parse_cpulist(node.cpus)}
        if not allowed:
            raise StackctlError(
                "placement: the chosen NUMA nodes have no CPU",
                hint="set placement.cpus too",
                exit_code=ExitCode.USAGE,
            )
    if cpu.kinds:
        # Hybrid processors: the slowest thread sets the pace, so only the fastest kind is used.
        allowed = (allowed & set(parse_cpulist(cpu.kinds[0].cpus))) or allowed
    cores = _grouped(host, allowed)
    # A core whose sibling is claimed is claimed, also by one that this process may not use.
    taken = _with_siblings(host, ledger.claimed_cpus(claims))
    free = tuple(core for core in cores if not taken & set(core))
    if not free:
        return cores, False
    return free, len(free) < len(cores)


def _one_node(
    host: Host, wish: PlacementWish, nodes: tuple[int, ...], cores: Cores, engine: str
) -> tuple[tuple[int, ...], Cores]:
    """Return the node with most of the cores, and those, for an engine that uses one node."""
    if wish.nodes is not None:
        raise StackctlError(
            f"placement.nodes: {engine} on the CPU uses one NUMA node, not {format_cpulist(nodes)}",
            hint=f'--set placement.nodes="{nodes[0]}"',
            exit_code=ExitCode.USAGE,
        )
    best: int = nodes[0]
    most: Cores = ()
    for node in host.cpu.numa:
        own = set(parse_cpulist(node.cpus))
        there = tuple(core for core in cores if own & set(core))
        if node.id in nodes and len(there) > len(most):
            best, most = node.id, there
    return (best,), most or cores


def _shared_with(host: Host, chosen: Cores, claims: Sequence[Claim]) -> tuple[str, ...]:
    """The stacks that claim CPUs of the chosen cores."""
    mine = _with_siblings(host, {cpu for core in chosen for cpu in core})
    return tuple(claim.stack for claim in claims if mine & set(parse_cpulist(claim.cpus)))


def sharing(stacks: Sequence[str]) -> str:
    """What it means to share cores with those stacks; empty for none."""
    if not stacks:
        return ""
    who = "both slow down while both work" if len(stacks) == 1 else "all slow down together"
    return f"shared with {', '.join(stacks)}: {who}"


def _with_siblings(host: Host, cpus: Set[int]) -> set[int]:
    """The CPUs and all that share a core with them."""
    cores = (set(parse_cpulist(core)) for core in host.cpu.siblings)
    return set(cpus).union(*(core for core in cores if core & cpus))


def _grouped(host: Host, allowed: set[int]) -> Cores:
    cpu = host.cpu
    if cpu.siblings:
        groups = (set(parse_cpulist(core)) & allowed for core in cpu.siblings)
        return tuple(tuple(sorted(group)) for group in groups if group)
    if cpu.cores and cpu.threads and cpu.cores < cpu.threads and len(allowed) == cpu.threads:
        # Which CPUs share a core is unknown: numbering first all cores, then siblings, is usual.
        return tuple((first,) for first in sorted(allowed)[: cpu.cores])
    return tuple((one,) for one in sorted(allowed))


def _near_gpu(host: Host, cores: Cores, gpus: tuple[Gpu, ...]) -> tuple[Cores, str]:
    """The last few cores of each GPU's node: CPU stacks take the first ones."""
    chosen: set[tuple[int, ...]] = set()
    places: list[str] = []
    for gpu in gpus:
        node = next((n for n in host.cpu.numa if n.id == gpu.numa_node), None)
        local = set(parse_cpulist(node.cpus)) if node is not None else set()
        near = [core for core in cores if set(core) & local and core not in chosen]
        if near or len(host.cpu.numa) == 1:
            places.append(f"on GPU {gpu.index}'s node")
        elif node is None:
            places.append(f"node of GPU {gpu.index} unknown")
        else:
            places.append(f"no core left on GPU {gpu.index}'s node")
        others = [core for core in cores if core not in chosen]
        chosen.update((near or others)[-_GPU_WORKER_CORES:])
    why = ", ".join(places) + "; a GPU worker needs few cores"
    return tuple(core for core in cores if core in chosen), why


def _beside_gpus(
    nodes: tuple[int, ...], gpus: tuple[Gpu, ...]
) -> tuple[tuple[int, ...], Policy, str]:
    """Memory of workers that only feed GPUs. Preferred, not bound: with a full node they go on."""
    near = {gpu.numa_node for gpu in gpus}
    names = "GPU " + ",".join(str(gpu.index) for gpu in gpus)
    if len(near) > 1:
        return nodes, "default", f"{names} are on several nodes: each worker uses its CPUs' own"
    (node,) = near
    if node is None or node not in nodes:
        return nodes, "default", f"no memory known on the node of {names}"
    return (node,), "preferred", f"what enters {names} passes through node {node}, its own"


def _policy(host: Host, wish: PlacementWish, nodes: tuple[int, ...]) -> tuple[Policy, str]:
    if wish.policy == "bind":
        return "bind", f"memory bound to node {format_cpulist(nodes)}, as asked"
    if wish.nodes is not None and wish.policy == "auto":
        if len(nodes) == 1:
            return "bind", f"node {format_cpulist(nodes)} was asked for"
        return "interleave", "pages spread over the nodes asked for: all their bandwidth"
    if wish.policy in ("default", "interleave"):
        return wish.policy, "as asked"
    if len([node for node in host.cpu.numa if node.memory_bytes]) > 1:
        reason = (
            f"pages spread over {len(nodes)} nodes: the bandwidth of all of them (pages of the "
            "model that are cached already stay where they are)"
        )
        return "interleave", reason
    return "default", "one NUMA node" if len(host.cpu.numa) == 1 else "NUMA nodes unknown"


def _computing(
    cores: Cores, smt: bool, bound: bool, claimed: bool
) -> tuple[Cores, str, tuple[tuple[int, str] | None, tuple[int, str] | None]]:
    """Return the cores of an engine that computes on the CPU, why these, and its threads."""
    kept = 0 if bound or claimed else _kept(len(cores))
    chosen = cores[: len(cores) - kept]
    why = _why_cpus(bound, smt, kept, claimed)
    return chosen, why, _threads(cores, chosen, smt, claimed)


def _why_cpus(bound: bool, smt: bool, kept: int, claimed: bool) -> str:
    if bound:
        return "bound as asked"
    parts = ["cores that no other stack claims"] if claimed else []
    parts += ["one CPU of each core: hyperthreads slow generation down"] if smt else []
    parts += [f"{kept} {'core' if kept == 1 else 'cores'} kept free"] if kept else []
    return ", ".join(parts) or "all allowed cores"


def _kept(cores: int) -> int:
    """Cores left to the system and to GPU workers.

    Generation waits for memory, and one busy neighbour stalls all threads: best on the reference
    machine were 13 to 14 of 16. Below 5 cores each one counts.
    """
    return 0 if cores <= 4 else 1 if cores <= 8 else 2 if cores <= 32 else 3


def _threads(
    cores: Cores, chosen: Cores, smt: bool, claimed: bool
) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Threads for generation and for prompts.

    Memory is saturated long before the last of many cores: an EPYC 9654 generated fastest with
    about 60 of its 96. Prompts are bound by arithmetic and use every core.
    """
    count = len(chosen)
    if not count:
        return None, None
    noun = "physical cores" if smt else "cores"
    if count < len(cores):
        kept = len(cores) - count
        why = f"{len(cores)} {noun}, {kept} kept free: one busy neighbour stalls all threads; "
        why += f"given up: {100 * kept / len(cores):.0f} % of the prompt speed"
    else:
        why = f"the {count} {noun} left" if claimed else f"all {count} {noun}"
    if count <= _MANY_CORES:
        return (count, why), (count, "prompts use the same cores")
    fewer = max(_MANY_CORES, round(count * _MANY_SHARE))
    return (fewer, f"of {count} {noun}: memory is saturated before all of them"), (count, why)
