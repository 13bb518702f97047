"""CPUs and threads: where the engine may run, how many threads compute, and who is in their way."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.diagnose.findings import fail, info, not_told, ok, unseen, up_again, warn
from stackctl.engines.protocol import whole_argument
from stackctl.values.cpulist import format_cpulist, parse_cpulist
from stackctl.values.generation import Generation
from stackctl.values.result import Result
from stackctl.values.seen import Seen, Thread

#: A thread computes when it ran for this share of the busiest one's time. Measured with a model of
#: 1.4 MB, where little is to be computed: the workers 0.45 to 1.0, all others below 0.05.
_COMPUTES = 0.15
#: Less than this of the busiest thread, in nanoseconds: nothing was computed.
_LEAST_NS = 1_000_000
#: From this share of their time on that threads wait for a CPU, somebody is in their way.
_WAITS = 0.1


def compare(generation: Generation, seen: Seen) -> Iterator[Result]:
    """CPUs, cpuset, threads, neighbours."""
    yield _cpus(generation, seen)
    yield from _cpuset(generation, seen)
    yield from _threads(generation, seen)
    yield from _neighbours(generation, seen)


def _cpus(generation: Generation, seen: Seen) -> Result:
    """Where the kernel lets threads run."""
    placement = generation.plan.placement
    lists = [thread.cpus for thread in seen.threads if thread.cpus is not None]
    if placement.cpus is None:
        return unseen("cpus", None, "the plan names no CPUs")
    if not lists:
        return not_told(seen, "cpus", placement.cpus, "threads")
    planned = set(parse_cpulist(placement.cpus))
    each = [set(parse_cpulist(text)) for text in lists]
    may = set[int]().union(*each)
    actual = format_cpulist(may)
    count = f"{len(lists)} threads"
    if seen.online is not None and (gone := planned - set(parse_cpulist(seen.online))):
        listed = format_cpulist(gone)
        return fail(
            "cpus",
            placement.cpus,
            f"{actual}, all {count}",
            f"the machine has CPU {listed} no more: offline, see dmesg",
            f"sudo chcpu --enable {listed}; then stackctl restart {generation.stack}",
        )
    if lacking := planned - may:
        return fail(
            "cpus",
            placement.cpus,
            f"{actual}, all {count}",
            f"no thread may use CPU {format_cpulist(lacking)}: its threads share what is left. Set "
            "from outside: taskset, CPUAffinity=, AllowedCPUs= or the cpuset of a slice above",
            f"systemctl show -p AllowedCPUs -p CPUAffinity {generation.units.service}; "
            f"then stackctl restart {generation.stack}",
        )
    astray = sum(not cpus <= planned for cpus in each)
    if astray and placement.cpuset:
        return fail(
            "cpus",
            placement.cpus,
            f"{actual}: {astray} of {count} may leave them",
            "the cpuset that was planned does not hold them",
            up_again(generation),
        )
    if astray:
        return info(
            "cpus", placement.cpus, f"{actual}; {placement.cpus} are meant, the scheduler decides"
        )
    every = "every thread" if all(cpus == planned for cpus in each) else f"{count}, some on a part"
    return ok("cpus", placement.cpus, f"{actual}, {every}")


def _cpuset(generation: Generation, seen: Seen) -> Iterator[Result]:
    """What the cgroup enforces."""
    placement = generation.plan.placement
    if not placement.cpuset:
        if seen.cpuset_controller is False:
            yield info("cpuset", None, "none planned, and services here have no such controller")
        elif seen.cpuset_cpus is not None:
            yield info("cpuset", None, f"none planned; {seen.cpuset_cpus} from above")
        return
    bound = placement.policy == "bind"
    expected = f"CPUs {placement.cpus}" + (f", memory nodes {placement.mems}" if bound else "")
    if seen.cpuset_cpus is None and seen.cpuset_controller is None:
        yield not_told(seen, "cpuset", expected)
        return
    if seen.cpuset_cpus is None:
        yield fail(
            "cpuset",
            expected,
            "none",
            "the cpuset controller is not delegated to these services, so nothing holds the engine",
            f"stackctl doctor {generation.plan.profile} names the fix; then {up_again(generation)}",
        )
        return
    right = _same(seen.cpuset_cpus, placement.cpus)
    right &= not bound or _same(seen.cpuset_mems, placement.mems)
    actual = f"CPUs {seen.cpuset_cpus}" + (f", memory nodes {seen.cpuset_mems}" if bound else "")
    if right:
        yield ok("cpuset", expected, actual)
    else:
        cause = seen.first_drift or "a slice above allows less, or it was changed"
        yield fail("cpuset", expected, actual, cause, up_again(generation))


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and set(parse_cpulist(one)) == set(parse_cpulist(other or ""))


def computing(threads: tuple[Thread, ...]) -> tuple[Thread, ...]:
    """The threads that computed while they were watched; none where nothing did."""
    most = max((thread.computed_ns or 0 for thread in threads), default=0)
    if most < _LEAST_NS:
        return ()
    return tuple(t for t in threads if (t.computed_ns or 0) >= _COMPUTES * most)


def _threads(generation: Generation, seen: Seen) -> Iterator[Result]:
    """How many threads compute. An engine that does it on a GPU has no use for them."""
    plan = generation.plan
    planned = whole_argument(plan.argv, "threads")
    if planned is None or plan.placement.gpus:
        return
    expected = f"{planned} that compute"
    most = max(planned, whole_argument(plan.argv, "threads-batch") or 0)
    if all(thread.computed_ns is None for thread in seen.threads):
        yield not_told(seen, "threads", expected)
        return
    busy = computing(seen.threads)
    watched = f"watched for {seen.watched_s} s, {seen.watched}"
    if not busy:
        yield unseen("threads", expected, f"none computed: {watched}")
        return
    count, of = len(busy), len(seen.threads)
    actual = f"{count} of {of} compute ({seen.watched})"
    if planned <= count <= most:
        yield ok("threads", expected, actual, watched)
        return
    said = next((fact.value for fact in seen.log if fact.name == "threads"), None)
    given = whole_argument(seen.argv or (), "threads")
    if said == str(planned) == str(given):
        # The engine and its arguments agree with the plan: a thread was kept from its CPU.
        yield warn(
            "threads", expected, actual, f"its log says {said}; {watched}, on a busy machine"
        )
        return
    cause = f"it was started with --threads {given}" if given not in (None, planned) else watched
    cpus = len(parse_cpulist(plan.placement.cpus or ""))
    if cpus and count > cpus:
        cause += f"; more threads than its {cpus} CPUs wait for each other at every step"
    yield fail("threads", expected, actual, cause, up_again(generation))


def _neighbours(generation: Generation, seen: Seen) -> Iterator[Result]:
    """Whether somebody else computes on the plan's CPUs."""
    placement = generation.plan.placement
    if placement.cpus is None or all(thread.waited_ns is None for thread in seen.threads):
        yield not_told(seen, "cores", None, "threads")
        return
    expected = f"CPUs {placement.cpus} for the engine alone"
    busy = computing(seen.threads) or seen.threads
    ran = sum(thread.computed_ns or 0 for thread in busy)
    waited = sum(thread.waited_ns or 0 for thread in busy)
    share = waited / (ran + waited) if ran + waited else 0.0
    told = f"its threads waited {100 * share:.0f} % of their time for a CPU"
    others = [
        f"{one.command} (process {one.pid}) wants {100 * one.wanted:.0f} % of a CPU on {one.cpus}"
        for one in seen.neighbours
    ]
    pinned = [n for n, one in enumerate(seen.neighbours) if one.pinned]
    if pinned:
        one = seen.neighbours[pinned[0]]
        cause = f"{told}; one busy neighbour holds all threads up at every step"
        yield fail(
            "cores",
            expected,
            f"{one.command} (process {one.pid}) is pinned to CPU {one.cpus}",
            f"it wants {100 * one.wanted:.0f} % of it and got {100 * one.share:.0f} %; {cause}",
            f"end it, or give it other CPUs: taskset -apc CPUS {one.pid}",
        )
    elif share >= _WAITS:
        shared, cpus = ", ".join(placement.shared_with), len(parse_cpulist(placement.cpus))
        cause = "; ".join(others)
        if len(busy) > cpus and whole_argument(seen.argv or (), "threads") is not None:
            cause = f"{len(busy)} of its own threads share {cpus} CPUs"
        elif not cause and shared:
            cause = f"the plan shares them with {shared}"
        elif not cause:
            cause = "no busy process is to be seen: short-lived ones, or other virtual machines"
        yield warn("cores", expected, told, cause, "fewer threads, or quieter neighbours")
    else:
        yield ok("cores", expected, told, "; ".join(others) or None)
