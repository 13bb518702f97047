"""Comparison of CPUs, threads and memory with the plan, and a search for disturbing processes."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping

from stackctl.diagnose.results import Comparison, redeploy_command
from stackctl.engines import engine as find_engine
from stackctl.engines.options import int_option_in_argv
from stackctl.quantity import format_bytes
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import Generation
from stackctl.values.host import UNLIMITED
from stackctl.values.inspection import EngineThread, Inspection, PageKind
from stackctl.values.result import Result

#: A thread computes if it ran for at least this share of the busiest thread's time. Measured with a
#: model of 1.4 MB, which computes little: workers 0.45 to 1.0, other threads below 0.05.
_COMPUTES = 0.15
#: If the busiest thread ran for fewer nanoseconds, nothing was computed.
_LEAST_NS = 1_000_000
#: If threads wait for a CPU for this share of their time, something disturbs them.
_WAITS = 0.1
_MIB = 2**20
#: At least this share of bound memory lies on its nodes; the kernel keeps a little elsewhere.
_BOUND = 0.95
#: Of interleaved memory no node holds more than _UNEVEN times its share plus _LITTLE.
_UNEVEN, _LITTLE = 1.25, 0.02
#: Less memory than this cannot be spread evenly, because huge pages are placed whole.
_LEAST_SPREAD = 64 * _MIB
#: A model counts as locked from this share on: its header is not locked.
_LOCKED = 0.95
#: Memory up to this much over the budget is accepted: page tables and thread stacks are not
#: planned.
_OVER, _OVER_BYTES = 1.05, 32 * _MIB


def verify_placement(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare CPUs, cpuset, threads, neighbours, and then memory with the plan."""
    yield _cpus(generation, inspection)
    yield from _cpuset(generation, inspection)
    yield from _threads(generation, inspection)
    yield _neighbours(generation, inspection)
    yield _policy(generation, inspection)
    yield _memory(generation, inspection)
    yield from _locked(generation, inspection)
    yield _resident(generation, inspection)
    yield _hugepages(inspection)


def _cpus(generation: Generation, inspection: Inspection) -> Result:
    """Compare the CPUs that the threads may use with the planned CPUs."""
    placement = generation.plan.placement
    planned = placement.cpus
    if planned is None:
        return Comparison("cpus").skip("the plan names no CPUs")
    cpus = Comparison("cpus", str(planned))
    lists = [thread.cpus for thread in inspection.threads if thread.cpus is not None]
    if not lists:
        return cpus.skip_missing(inspection, "threads")
    may = CpuList(cpu for allowed in lists for cpu in allowed)
    count = f"{len(lists)} threads"
    restart = f"then stackctl restart {generation.stack}"
    if inspection.online is not None and (gone := planned - inspection.online):
        return cpus.fail(
            f"{may}, all {count}",
            f"the machine has CPU {gone} no more: offline, see dmesg",
            f"sudo chcpu --enable {gone}; {restart}",
        )
    if lacking := planned - may:
        return cpus.fail(
            f"{may}, all {count}",
            f"no thread may use CPU {lacking}: its threads share what is left. Set "
            "from outside: taskset, CPUAffinity=, AllowedCPUs= or the cpuset of a slice above",
            f"systemctl show -p AllowedCPUs -p CPUAffinity {generation.units.service}; {restart}",
        )
    astray = sum(not allowed <= planned for allowed in lists)
    if astray and placement.cpuset:
        cause = "the cpuset that was planned does not hold them"
        remedy = redeploy_command(generation)
        return cpus.fail(f"{may}: {astray} of {count} may leave them", cause, remedy)
    if astray:
        return cpus.info(f"{may}; {planned} are meant, the scheduler decides")
    every = all(allowed == planned for allowed in lists)
    return cpus.ok(f"{may}, {'every thread' if every else f'{count}, some on a part'}")


def _cpuset(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare the cpuset of the cgroup with the planned one."""
    placement = generation.plan.placement
    if not placement.cpuset:
        unplanned = Comparison("cpuset")
        if inspection.cpuset_controller is False:
            yield unplanned.info("none planned, and services here have no such controller")
        elif inspection.cpuset_cpus is not None:
            yield unplanned.info(f"none planned; {inspection.cpuset_cpus} from above")
        return
    bound = placement.policy == "bind"
    nodes = f", memory nodes {placement.mems}" if bound else ""
    cpuset = Comparison("cpuset", f"CPUs {placement.cpus}{nodes}")
    if inspection.cpuset_cpus is None and inspection.cpuset_controller is None:
        yield cpuset.skip_missing(inspection)
        return
    redeploy = redeploy_command(generation)
    if inspection.cpuset_cpus is None:
        yield cpuset.fail(
            "none",
            "the cpuset controller is not delegated to these services, so nothing holds the engine",
            f"stackctl doctor {generation.plan.profile} names the fix; then {redeploy}",
        )
        return
    right = inspection.cpuset_cpus == placement.cpus
    right &= not bound or (inspection.cpuset_mems or CpuList()) == placement.mems
    nodes = f", memory nodes {inspection.cpuset_mems}" if bound else ""
    actual = f"CPUs {inspection.cpuset_cpus}{nodes}"
    if right:
        yield cpuset.ok(actual)
    else:
        cause = inspection.first_drift or "a slice above allows less, or it was changed"
        yield cpuset.fail(actual, cause, redeploy)


def _active_threads(threads: tuple[EngineThread, ...]) -> tuple[EngineThread, ...]:
    """Return the threads that computed during the sampling; empty if none did."""
    most = max((thread.computed_ns or 0 for thread in threads), default=0)
    if most < _LEAST_NS:
        return ()
    return tuple(t for t in threads if (t.computed_ns or 0) >= _COMPUTES * most)


def _threads(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare the number of computing threads with the plan; skip engines on a GPU."""
    plan = generation.plan
    options = find_engine(plan.engine).threads_options
    planned = int_option_in_argv(plan.argv, options[0]) if options else None
    if options is None or planned is None or plan.placement.gpus:
        return
    threads = Comparison("threads", f"{planned} that compute")
    most = max(planned, int_option_in_argv(plan.argv, options[1]) or 0)
    if all(thread.computed_ns is None for thread in inspection.threads):
        yield threads.skip_missing(inspection)
        return
    busy = _active_threads(inspection.threads)
    watched = f"watched for {inspection.watched_s} s, {inspection.watched}"
    if not busy:
        yield threads.skip(f"none computed: {watched}")
        return
    count = len(busy)
    actual = f"{count} of {len(inspection.threads)} compute ({inspection.watched})"
    if planned <= count <= most:
        yield threads.ok(actual, watched)
        return
    said = next((fact.value for fact in inspection.log if fact.name == "threads"), None)
    given = int_option_in_argv(inspection.argv or (), options[0])
    if said == str(planned) == str(given):
        # The engine and its arguments agree with the plan, so other work kept a thread from its
        # CPU.
        yield threads.warn(actual, f"its log says {said}; {watched}, on a busy machine")
        return
    cause = watched
    if given not in (None, planned):
        cause = f"it was started with --{options[0]} {given}"
    cpus = len(plan.placement.cpus or ())
    if cpus and count > cpus:
        cause += f"; more threads than its {cpus} CPUs wait for each other at every step"
    yield threads.fail(actual, cause, redeploy_command(generation))


def _neighbours(generation: Generation, inspection: Inspection) -> Result:
    """Check that no other process takes the planned CPUs from the engine's threads."""
    placement = generation.plan.placement
    if placement.cpus is None or all(thread.waited_ns is None for thread in inspection.threads):
        return Comparison("cores").skip_missing(inspection, "threads")
    cores = Comparison("cores", f"CPUs {placement.cpus} for the engine alone")
    threads = _active_threads(inspection.threads) or inspection.threads
    waited_ns = sum(thread.waited_ns or 0 for thread in threads)
    runnable_ns = waited_ns + sum(thread.computed_ns or 0 for thread in threads)
    share = waited_ns / runnable_ns if runnable_ns else 0.0
    waited = f"its threads waited {100 * share:.0f} % of their time for a CPU"
    others = "; ".join(
        f"{one.command} (process {one.pid}) wants {100 * one.wanted:.0f} % of a CPU on {one.cpus}"
        for one in inspection.neighbours
    )
    pinned = next((one for one in inspection.neighbours if one.pinned), None)
    if pinned is not None:
        return cores.fail(
            f"{pinned.command} (process {pinned.pid}) is pinned to CPU {pinned.cpus}",
            f"it wants {100 * pinned.wanted:.0f} % of it and got {100 * pinned.share:.0f} %; "
            f"{waited}; one busy neighbour holds all threads up at every step",
            f"end it, or give it other CPUs: taskset -apc CPUS {pinned.pid}",
        )
    if share >= _WAITS:
        cause = _cause_of_waiting(generation, inspection, len(threads), others)
        return cores.warn(waited, cause, "fewer threads, or quieter neighbours")
    return cores.ok(waited, others or None)


def _cause_of_waiting(
    generation: Generation, inspection: Inspection, busy: int, others: str
) -> str:
    placement = generation.plan.placement
    options = find_engine(generation.plan.engine).threads_options
    given = int_option_in_argv(inspection.argv or (), options[0]) if options else None
    cpus = len(placement.cpus or ())
    if given is not None and busy > cpus:
        return f"{busy} of its own threads share {cpus} CPUs"
    if others:
        return others
    if placement.shared_with:
        return f"the plan shares them with {', '.join(placement.shared_with)}"
    return "no busy process is to be seen: short-lived ones, or other virtual machines"


def _sums(inspection: Inspection, *kinds: PageKind) -> dict[int, int]:
    """Return the bytes of some kinds of pages on each node."""
    found: dict[int, int] = defaultdict(int)
    for process in inspection.processes:
        for pages in process.pages:
            if pages.kind in kinds:
                for held in pages.nodes:
                    found[held.node] += held.bytes
    return dict(found)


def _dominant_policy(inspection: Inspection) -> str | None:
    """Return the policy of most of the engine's own memory; None if unknown."""
    found: dict[str, int] = defaultdict(int)
    for process in inspection.processes:
        for pages in process.pages:
            if pages.kind in ("anonymous", "shared"):
                found[pages.policy] += sum(held.bytes for held in pages.nodes)
    return max(found, key=lambda text: found[text]) if found else None


def _policy(generation: Generation, inspection: Inspection) -> Result:
    placement = generation.plan.placement
    nodes = placement.mems or CpuList()
    planned = placement.policy if placement.policy == "default" else f"{placement.policy}:{nodes}"
    policy = Comparison("policy", planned)
    actual = _dominant_policy(inspection)
    if actual is None:
        return policy.skip_missing(inspection, "numa")
    # In "interleave=static:0-1" the flag sets the effect of a changed cpuset on the nodes.
    name, _, have = actual.partition(":")
    name = name.partition("=")[0]
    if placement.policy == "default":
        if name == "default":
            return policy.ok(actual)
        return policy.info(f"{actual}, set by the engine itself")
    # The kernel writes "prefer" for preferred.
    if name == placement.policy.removesuffix("red") and have and CpuList.parse(have) == nodes:
        return policy.ok(actual)
    if placement.policy == "bind" and inspection.mems and inspection.mems == nodes:
        return policy.ok(f"{actual}, within nodes {inspection.mems} by the cpuset")
    cause = "the engine did not inherit the unit's NUMAPolicy=, or set another one itself"
    return policy.fail(actual, inspection.first_drift or cause, redeploy_command(generation))


def _memory(generation: Generation, inspection: Inspection) -> Result:
    """Compare the nodes of the pages with the plan: the model's, and the engine's own."""
    placement = generation.plan.placement
    model, own = _sums(inspection, "model"), _sums(inspection, "anonymous", "shared")
    total = {node: model.get(node, 0) + own.get(node, 0) for node in {*model, *own}}
    nodes = placement.mems or CpuList()
    if not sum(total.values()):
        return Comparison("memory").skip_missing(inspection, "numa")
    actual = _where(total)
    evidence = f"model: {_where(model)}; its own: {_where(own)}" if len(total) > 1 else None
    if not nodes:
        return Comparison("memory").info(actual, evidence)
    if placement.policy == "preferred":
        preferred = Comparison("memory", f"on node {nodes}, as it has room")
        return preferred.info(actual, evidence)
    if len(nodes) == 1 or placement.policy == "bind":
        memory = Comparison("memory", f"on node{'s' if len(nodes) > 1 else ''} {nodes}")
        wrong = [part for part in (own, model) if _share(part, nodes) < _BOUND]
    elif placement.policy == "interleave":
        memory = Comparison("memory", f"spread evenly over nodes {nodes}")
        wrong = [part for part in (own, model) if not _even(part, len(nodes))]
    else:
        return Comparison("memory", "left to the kernel").info(actual, evidence)
    if not wrong:
        return memory.ok(actual, evidence)
    redeploy = redeploy_command(generation)
    if own in wrong:
        cause = "the memory policy that was planned is not in effect"
        return memory.fail(actual, f"{cause}; {evidence or actual}", redeploy)
    files = [file.path for file in generation.plan.model.files]
    drop = "echo 1 | sudo tee /proc/sys/vm/drop_caches"
    if len(files) == 1:
        drop = f"dd {shlex.quote(f'if={files[0]}')} iflag=nocache count=0"
    return memory.fail(
        actual,
        f"{evidence}. The model's pages were in the page cache already, placed by an earlier run "
        "or a copy, and stay where they are",
        f"stackctl down {generation.stack}; {drop}; {redeploy}",
    )


def _where(held: Mapping[int, int]) -> str:
    """Return the distribution as text, such as ``node 0 holds 100 % of 7.3 GiB``.

    List up to 4 nodes; for more, give the lowest and the highest share.
    """
    total = sum(held.values())
    if not total:
        return "nothing"
    shares = {node: round(100 * held[node] / total) for node in sorted(held) if held[node]}
    size = format_bytes(total)
    if len(shares) == 1:
        return f"node {next(iter(shares))} holds 100 % of {size}"
    if len(shares) <= 4:
        each = ", ".join(f"node {node} {share} %" for node, share in shares.items())
        return f"{each} of {size}"
    least, most = min(shares.values()), max(shares.values())
    return f"{len(shares)} nodes hold {least}-{most} % of {size} each"


def _share(held: Mapping[int, int], nodes: CpuList) -> float:
    total = sum(held.values())
    return sum(held.get(node, 0) for node in nodes) / total if total else 1.0


def _even(held: Mapping[int, int], count: int) -> bool:
    total = sum(held.values())
    if total < _LEAST_SPREAD:
        return True
    return max(held.values()) / total <= _UNEVEN / count + _LITTLE


def _locked(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    plan, stack = generation.plan, generation.stack
    known = [p.locked_bytes for p in inspection.processes if p.locked_bytes is not None]
    total = sum(known)
    if not find_engine(plan.engine).locks_model(plan.argv):
        if known:
            reason = next((d.reason for d in plan.decisions if d.field == "load-mode"), None)
            actual = f"{format_bytes(total)}, {reason or 'none planned'}"
            yield Comparison("locked").info(actual)
        return
    need = plan.model.weights_bytes
    locked = Comparison("locked", f"{format_bytes(need)}, the whole model")
    if not known:
        yield locked.skip_missing(inspection)
        return
    actual = f"{format_bytes(total)} of {format_bytes(need)}"
    if total >= _LOCKED * need:
        yield locked.ok(actual)
        return
    said = next((fact.value for fact in inspection.log if fact.name == "mlock"), None)
    limit = inspection.memlock_bytes
    causes = [f"{plan.engine}: {said}"] if said else []
    remedy = f"stackctl logs {stack} tells why"
    if limit is not None and limit != UNLIMITED and limit < need:
        causes.append(f"the limit of its process is {format_bytes(limit)}")
        remedy = f"stackctl provision --only memlock; then stackctl restart {stack}"
    yield locked.fail(actual, "; ".join(causes) or None, remedy)


def _resident(generation: Generation, inspection: Inspection) -> Result:
    plan = generation.plan
    budget = plan.host_memory if plan.placement.gpus and plan.host_memory else plan.memory
    resident = Comparison("resident", f"{format_bytes(budget.total_bytes)} at most")
    known = [(p, p.own_bytes, p.file_bytes) for p in inspection.processes]
    sizes = [(p, own, files) for p, own, files in known if own is not None and files is not None]
    if not sizes or len(sizes) < len(known):
        return resident.skip_missing(inspection, "memory")
    # Processes of one engine map the same files, so the largest mapping counts once. It counts in
    # full even if processes of other stacks share its pages.
    mapped = max(files for _, _, files in sizes)
    if plan.placement.gpus:
        # Weights that were copied to the GPU are only page cache; the others stay in main memory.
        model = min(mapped, sum(_sums(inspection, "model").values()))
        mapped += min(model, budget.weights_bytes) - model
    total = sum(own for _, own, _ in sizes) + mapped
    actual = f"{format_bytes(total)} of {format_bytes(budget.total_bytes)} planned"
    parts = "; ".join(
        f"{p.command} (process {p.id}): {format_bytes(own)} and {format_bytes(files)} of files"
        for p, own, files in sizes
    )
    if total <= budget.total_bytes * _OVER + _OVER_BYTES:
        return resident.ok(actual, parts)
    return resident.fail(
        actual,
        f"{parts}. Plans of other stacks count on the smaller number",
        "a smaller context, or a smaller cache: --set engine_args.cache-ram=MIB",
    )


def _hugepages(inspection: Inspection) -> Result:
    pages = Comparison("hugepages")
    known = [p.huge_bytes for p in inspection.processes if p.huge_bytes is not None]
    if not known:
        return pages.skip_missing(inspection)
    choice = f"; transparent huge pages: {inspection.hugepages}" if inspection.hugepages else ""
    return pages.info(f"{format_bytes(sum(known))}{choice}")
