"""Comparison of CPUs and threads with the plan, and a search for processes that disturb them."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.diagnose.verify_results import (
    fail,
    info,
    ok,
    redeploy_command,
    skip,
    skip_missing,
    warn,
)
from stackctl.engines import engine as find_engine
from stackctl.engines.options import int_option_in_argv
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import Generation
from stackctl.values.inspection import EngineThread, Inspection
from stackctl.values.result import Result

#: A thread computes if it ran for at least this share of the busiest thread's time. Measured with a
#: model of 1.4 MB, which computes little: workers 0.45 to 1.0, other threads below 0.05.
_COMPUTES = 0.15
#: If the busiest thread ran for fewer nanoseconds, nothing was computed.
_LEAST_NS = 1_000_000
#: If threads wait for a CPU for this share of their time, something disturbs them.
_WAITS = 0.1


def verify_threads(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare CPUs, cpuset, threads and neighbours with the plan."""
    yield _cpus(generation, inspection)
    yield from _cpuset(generation, inspection)
    yield from _threads(generation, inspection)
    yield from _neighbours(generation, inspection)


def _cpus(generation: Generation, inspection: Inspection) -> Result:
    """Compare the CPUs that the threads may use with the planned CPUs."""
    placement = generation.plan.placement
    lists = [thread.cpus for thread in inspection.threads if thread.cpus is not None]
    if placement.cpus is None:
        return skip("cpus", None, "the plan names no CPUs")
    if not lists:
        return skip_missing(inspection, "cpus", str(placement.cpus), "threads")
    planned, expected = placement.cpus, str(placement.cpus)
    may = CpuList(cpu for cpus in lists for cpu in cpus)
    actual = str(may)
    count = f"{len(lists)} threads"
    if inspection.online is not None and (gone := planned - inspection.online):
        return fail(
            "cpus",
            expected,
            f"{actual}, all {count}",
            f"the machine has CPU {gone} no more: offline, see dmesg",
            f"sudo chcpu --enable {gone}; then stackctl restart {generation.stack}",
        )
    if lacking := planned - may:
        return fail(
            "cpus",
            expected,
            f"{actual}, all {count}",
            f"no thread may use CPU {lacking}: its threads share what is left. Set "
            "from outside: taskset, CPUAffinity=, AllowedCPUs= or the cpuset of a slice above",
            f"systemctl show -p AllowedCPUs -p CPUAffinity {generation.units.service}; "
            f"then stackctl restart {generation.stack}",
        )
    astray = sum(not cpus <= planned for cpus in lists)
    if astray and placement.cpuset:
        return fail(
            "cpus",
            expected,
            f"{actual}: {astray} of {count} may leave them",
            "the cpuset that was planned does not hold them",
            redeploy_command(generation),
        )
    if astray:
        return info("cpus", expected, f"{actual}; {expected} are meant, the scheduler decides")
    every = "every thread" if all(cpus == planned for cpus in lists) else f"{count}, some on a part"
    return ok("cpus", expected, f"{actual}, {every}")


def _cpuset(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare the cpuset of the cgroup with the planned one."""
    placement = generation.plan.placement
    if not placement.cpuset:
        if inspection.cpuset_controller is False:
            yield info("cpuset", None, "none planned, and services here have no such controller")
        elif inspection.cpuset_cpus is not None:
            yield info("cpuset", None, f"none planned; {inspection.cpuset_cpus} from above")
        return
    bound = placement.policy == "bind"
    expected = f"CPUs {placement.cpus}" + (f", memory nodes {placement.mems}" if bound else "")
    if inspection.cpuset_cpus is None and inspection.cpuset_controller is None:
        yield skip_missing(inspection, "cpuset", expected)
        return
    if inspection.cpuset_cpus is None:
        yield fail(
            "cpuset",
            expected,
            "none",
            "the cpuset controller is not delegated to these services, so nothing holds the engine",
            f"stackctl doctor {generation.plan.profile} names the fix; then "
            f"{redeploy_command(generation)}",
        )
        return
    right = inspection.cpuset_cpus == placement.cpus
    right &= not bound or (inspection.cpuset_mems or CpuList()) == placement.mems
    actual = f"CPUs {inspection.cpuset_cpus}" + (
        f", memory nodes {inspection.cpuset_mems}" if bound else ""
    )
    if right:
        yield ok("cpuset", expected, actual)
    else:
        cause = inspection.first_drift or "a slice above allows less, or it was changed"
        yield fail("cpuset", expected, actual, cause, redeploy_command(generation))


def active_threads(threads: tuple[EngineThread, ...]) -> tuple[EngineThread, ...]:
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
    expected = f"{planned} that compute"
    most = max(planned, int_option_in_argv(plan.argv, options[1]) or 0)
    if all(thread.computed_ns is None for thread in inspection.threads):
        yield skip_missing(inspection, "threads", expected)
        return
    busy = active_threads(inspection.threads)
    watched = f"watched for {inspection.watched_s} s, {inspection.watched}"
    if not busy:
        yield skip("threads", expected, f"none computed: {watched}")
        return
    count, of = len(busy), len(inspection.threads)
    actual = f"{count} of {of} compute ({inspection.watched})"
    if planned <= count <= most:
        yield ok("threads", expected, actual, watched)
        return
    said = next((fact.value for fact in inspection.log if fact.name == "threads"), None)
    given = int_option_in_argv(inspection.argv or (), options[0])
    if said == str(planned) == str(given):
        # The engine and its arguments agree with the plan, so other work kept a thread from its
        # CPU.
        yield warn(
            "threads", expected, actual, f"its log says {said}; {watched}, on a busy machine"
        )
        return
    cause = (
        f"it was started with --{options[0]} {given}" if given not in (None, planned) else watched
    )
    cpus = len(plan.placement.cpus or ())
    if cpus and count > cpus:
        cause += f"; more threads than its {cpus} CPUs wait for each other at every step"
    yield fail("threads", expected, actual, cause, redeploy_command(generation))


def _neighbours(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Check that no other process takes the planned CPUs from the engine's threads."""
    placement = generation.plan.placement
    if placement.cpus is None or all(thread.waited_ns is None for thread in inspection.threads):
        yield skip_missing(inspection, "cores", None, "threads")
        return
    expected = f"CPUs {placement.cpus} for the engine alone"
    share = _waiting_share(active_threads(inspection.threads) or inspection.threads)
    waited = f"its threads waited {100 * share:.0f} % of their time for a CPU"
    others = "; ".join(
        f"{one.command} (process {one.pid}) wants {100 * one.wanted:.0f} % of a CPU on {one.cpus}"
        for one in inspection.neighbours
    )
    pinned = next((one for one in inspection.neighbours if one.pinned), None)
    if pinned is not None:
        yield fail(
            "cores",
            expected,
            f"{pinned.command} (process {pinned.pid}) is pinned to CPU {pinned.cpus}",
            f"it wants {100 * pinned.wanted:.0f} % of it and got {100 * pinned.share:.0f} %; "
            f"{waited}; one busy neighbour holds all threads up at every step",
            f"end it, or give it other CPUs: taskset -apc CPUS {pinned.pid}",
        )
    elif share >= _WAITS:
        cause = _cause_of_waiting(generation, inspection, others)
        yield warn("cores", expected, waited, cause, "fewer threads, or quieter neighbours")
    else:
        yield ok("cores", expected, waited, others or None)


def _waiting_share(threads: tuple[EngineThread, ...]) -> float:
    """Return the share of the threads' runnable time in which they had no CPU."""
    ran = sum(thread.computed_ns or 0 for thread in threads)
    waited = sum(thread.waited_ns or 0 for thread in threads)
    return waited / (ran + waited) if ran + waited else 0.0


def _cause_of_waiting(generation: Generation, inspection: Inspection, others: str) -> str:
    plan = generation.plan
    options = find_engine(plan.engine).threads_options
    busy = len(active_threads(inspection.threads) or inspection.threads)
    cpus = len(plan.placement.cpus or ())
    if (
        options
        and busy > cpus
        and int_option_in_argv(inspection.argv or (), options[0]) is not None
    ):
        return f"{busy} of its own threads share {cpus} CPUs"
    if others:
        return others
    if plan.placement.shared_with:
        return f"the plan shares them with {', '.join(plan.placement.shared_with)}"
    return "no busy process is to be seen: short-lived ones, or other virtual machines"
