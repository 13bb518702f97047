"""Threads, CPUs, memory nodes and GPUs from the topology and the claims of other stacks.

A stack gets the physical cores that are allowed to it, of the right kind, and not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from stackctl.engines import engine as find_engine
from stackctl.engines import uses_gpu
from stackctl.engines.protocol import Engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan import claimed_resources
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Claim, Decision, DecisionSource, Placement, Policy
from stackctl.values.profile import PlacementRequest, Profile

_DELEGATE = (
    "for user services: stackctl provision --only cpuset, then log in again (by hand: write "
    "[Service] Delegate=cpu cpuset io memory pids to "
    "/etc/systemd/system/user@.service.d/10-stackctl-delegate.conf, then systemctl daemon-reload)"
)
#: A worker that only feeds a GPU gains nothing from more cores.
_GPU_WORKER_CORES = 2
#: Generation uses all cores up to this number, and only a share of more; see _threads.
_MANY_CORES = 60
_MANY_SHARE = 0.63

#: The CPUs of each physical core.
Cores = tuple[tuple[int, ...], ...]
#: Threads for generation and for prompts, each with its reason; None leaves them to the engine.
Threads = tuple[tuple[int, str] | None, tuple[int, str] | None]


@dataclass(frozen=True)
class PlacementResult:
    """The placement of a stack, and its threads with the reasons (None: left to the engine)."""

    placement: Placement
    threads: tuple[int, str] | None
    threads_batch: tuple[int, str] | None
    gpus: tuple[Gpu, ...]
    decisions: tuple[Decision, ...]


def choose_placement(host: Host, profile: Profile, claims: Sequence[Claim] = ()) -> PlacementResult:
    """Choose GPUs, CPUs, memory policy and the number of threads.

    Raises:
        StackctlError: exit 2 for CPUs, nodes or GPUs that the machine lacks, exit 6 if the
            machine lacks a GPU at all, or the cpuset controller for a binding.
    """
    wish, engine = profile.placement, find_engine(profile.engine)
    gpus, why_gpus = _gpus(host, profile, claims)
    nodes = _nodes(host, wish)
    cores, claimed = _usable_cores(host, wish, nodes, claims)
    one_node = engine.one_node_on_cpu and not gpus and len(nodes) > 1
    if one_node:
        nodes, cores = _cores_of_one_node(host, wish, nodes, cores, engine.title)
    smt = any(len(core) > 1 for core in cores)
    names_cpus = wish.cpus is not None or wish.nodes is not None
    bound = names_cpus or wish.policy == "bind"
    worker_only = bool(gpus) and not (engine.splits_experts and wish.cpu_experts is not None)
    if worker_only:
        chosen, why_cpus, (threads, batch) = _feeding(host, wish, engine, cores, gpus)
    else:
        chosen, why_cpus, (threads, batch) = _computing(cores, smt, bound, claimed)
    use_cpuset, unenforced = _cpuset(host, bound, smt or len(chosen) < len(cores))
    policy, why_policy = _policy(host, wish, nodes)
    if one_node:
        policy = "bind"
        why_policy = f"{engine.title} keeps a worker's memory on one node: {nodes[0]}"
    elif worker_only and wish.policy == "auto" and wish.nodes is None and len(nodes) > 1:
        nodes, policy, why_policy = _beside_gpus(nodes, gpus)
    shared = _claimants(host, chosen, claims)
    if shared:
        why_cpus += ", " + sharing_note(shared)
    placement = Placement(
        cpus=CpuList(core[0] for core in chosen) or None,
        mems=CpuList(nodes) or None,
        gpus=tuple(str(gpu.index) for gpu in gpus),
        policy=policy,
        cpuset=use_cpuset and (bound or bool(chosen)),
        shared_with=shared,
    )
    cpus = None if placement.cpus is None else str(placement.cpus)
    rows = (
        ("gpus", ",".join(placement.gpus), why_gpus, wish.gpus is not None),
        ("cpus", cpus, why_cpus + (unenforced if chosen else ""), names_cpus),
        ("memory-policy", policy, why_policy, wish.policy != "auto"),
    )
    overridden = any(key.startswith("placement.") for key in profile.overrides)
    asked: DecisionSource = "override" if overridden else "profile"
    decisions = tuple(
        Decision(field=field, value=value, reason=why, source=asked if wished else "derived")
        for field, value, why, wished in rows
        if field != "gpus" or gpus
    )
    return PlacementResult(placement, threads, batch, gpus, decisions)


def _cpuset(host: Host, bound: bool, partly: bool) -> tuple[bool, str]:
    """Return True if the cpuset controller enforces the chosen CPUs, and a note if it does not.

    Raises:
        StackctlError: exit 6 for a binding that services of this machine cannot have.
    """
    controllers = host.tools.cgroup_controllers
    lacking = host.tools.cgroup_version is not None and "cpuset" not in controllers
    if bound and lacking:
        raise StackctlError(
            "the profile binds CPUs or memory nodes, and services here cannot use the cpuset "
            "controller",
            hint=_DELEGATE + "; or leave placement out",
            exit_code=ExitCode.HOST,
        )
    if bound or (partly and "cpuset" in controllers):
        return True, ""
    return False, ", left to the scheduler" + (": no cpuset controller" if lacking else "")


def _gpus(host: Host, profile: Profile, claims: Sequence[Claim]) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs to use, and why.

    If the profile names none, an engine that is made for GPUs gets the GPU with most unclaimed
    memory, and any other engine gets none.
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
            key=lambda gpu: (
                (gpu.memory_bytes or 0) - claimed_resources.claimed_gpu_bytes(claims, gpu.index)
            ),
        )
        return (roomy,), _named((roomy,)) + (": most room of all" if len(host.gpus) > 1 else "")
    if str(wish) == "all":
        count, why = find_engine(profile.engine).usable_gpus(len(host.gpus))
        used = host.gpus[:count]
        return used, _named(used) + (f"; {why}" if why else "")
    wanted = CpuList.parse(str(wish))
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


def _nodes(host: Host, wish: PlacementRequest) -> tuple[int, ...]:
    """Return the memory nodes to use; none if the machine does not report them."""
    have = tuple(node.id for node in host.cpu.numa if node.memory_bytes != 0)
    if wish.nodes is None:
        return have
    wanted = CpuList.parse(str(wish.nodes))
    missing = [node for node in wanted if node not in have]
    if missing or not wanted:
        raise StackctlError(
            f"placement.nodes: this machine has no NUMA node {CpuList(missing)}".rstrip(),
            hint=f"nodes: {CpuList(have) or 'none known'}",
            exit_code=ExitCode.USAGE,
        )
    return tuple(wanted)


def sharing_note(stacks: Sequence[str]) -> str:
    """Return the effect of sharing cores with these stacks, as text; empty if there are none."""
    if not stacks:
        return ""
    who = "both slow down while both work" if len(stacks) == 1 else "all slow down together"
    return f"shared with {', '.join(stacks)}: {who}"


def _near_gpu(host: Host, cores: Cores, gpus: tuple[Gpu, ...]) -> tuple[Cores, str]:
    """Return the last few cores of each GPU's node (CPU stacks take the first), and the reason."""
    chosen: set[tuple[int, ...]] = set()
    places: list[str] = []
    for gpu in gpus:
        node = next((n for n in host.cpu.numa if n.id == gpu.numa_node), None)
        local = set(node.cpus) if node is not None else set()
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
    """Return memory nodes, policy and reason for workers that only feed GPUs.

    The node is preferred and not bound, so that workers still run if it is full.
    """
    near = {gpu.numa_node for gpu in gpus}
    names = "GPU " + ",".join(str(gpu.index) for gpu in gpus)
    if len(near) > 1:
        return nodes, "default", f"{names} are on several nodes: each worker uses its CPUs' own"
    (node,) = near
    if node is None or node not in nodes:
        return nodes, "default", f"no memory known on the node of {names}"
    return (node,), "preferred", f"what enters {names} passes through node {node}, its own"


def _policy(host: Host, wish: PlacementRequest, nodes: tuple[int, ...]) -> tuple[Policy, str]:
    if wish.policy == "bind":
        return "bind", f"memory bound to node {CpuList(nodes)}, as asked"
    if wish.nodes is not None and wish.policy == "auto":
        if len(nodes) == 1:
            return "bind", f"node {CpuList(nodes)} was asked for"
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


def _feeding(
    host: Host, wish: PlacementRequest, engine: Engine, cores: Cores, gpus: tuple[Gpu, ...]
) -> tuple[Cores, str, Threads]:
    """Return the cores and threads of a worker that feeds GPUs, and why."""
    chosen, why = _near_gpu(host, cores, gpus)
    if wish.cpus is not None:
        # CPUs that the user names are used as they are.
        chosen, why = cores, "bound as asked"
    if engine.threads_options is None or not chosen:
        return chosen, why, (None, None)
    threads = (len(chosen), "the GPU does the work")
    return chosen, why, (threads, threads)


def _computing(cores: Cores, smt: bool, bound: bool, claimed: bool) -> tuple[Cores, str, Threads]:
    """Return the cores of an engine that computes on the CPU, why these, and its threads."""
    kept = 0 if bound or claimed else _kept(len(cores))
    chosen = cores[: len(cores) - kept]
    parts = ["cores that no other stack claims"] if claimed else []
    parts += ["one CPU of each core: hyperthreads slow generation down"] if smt else []
    parts += [f"{kept} {'core' if kept == 1 else 'cores'} kept free"] if kept else []
    why = "bound as asked" if bound else ", ".join(parts) or "all allowed cores"
    return chosen, why, _threads(cores, chosen, smt, claimed)


def _kept(cores: int) -> int:
    """Return the number of cores left to the system and to GPU workers.

    Generation waits for memory, and one busy neighbour stalls all threads: on the reference machine
    13 to 14 of 16 cores were fastest. With fewer than 5 cores all are used.
    """
    return 0 if cores <= 4 else 1 if cores <= 8 else 2 if cores <= 32 else 3


def _threads(cores: Cores, chosen: Cores, smt: bool, claimed: bool) -> Threads:
    """Return the threads for generation and for prompts.

    Many cores saturate the memory before all of them are used: an EPYC 9654 generated fastest with
    about 60 of its 96 cores. Prompts are bound by arithmetic and use every core.
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


def _usable_cores(
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


def _cores_of_one_node(
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


def _claimants(host: Host, chosen: Cores, claims: Sequence[Claim]) -> tuple[str, ...]:
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
