"""Snapshots of a running engine: its unit, its metrics, its log, and its CPU time."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from stackctl.deploy.context import Context
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine.systemd import UnitState
from stackctl.observe import procfs
from stackctl.units import render
from stackctl.values.diagnosis import CpuTime
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics, is_working

#: A thread is busy if it runs or waits for a CPU for at least this share of the time.
_BUSY = 0.25


@dataclass(frozen=True)
class EngineSnapshot:
    """A snapshot of a running engine.

    ``unit`` is the state of its unit. ``metrics`` is None if they were not requested or not
    reported (``late``: not in time).
    """

    unit: UnitState
    metrics: EngineMetrics | None = None
    late: bool = False
    threads: procfs.TimesByThread = field(default_factory=dict)

    @property
    def at_s(self) -> float:
        """Return the time of the snapshot, in seconds on the monotonic clock."""
        return self.unit.at_s


@dataclass(frozen=True)
class EngineWork:
    """The work of an engine between two snapshots.

    ``cpu_s`` is its CPU time (None: the machine does not count it); ``counted``: a counter of work
    changed.
    """

    interval_s: float
    cpu_s: float | None
    counted: bool

    @property
    def is_working(self) -> bool | None:
        """Return True if the engine works; None if neither counters nor CPU time show it."""
        if self.counted:
            return True
        return None if self.cpu_s is None else is_working(self.cpu_s, self.interval_s)


def engine_pids(context: Context, state: UnitState) -> tuple[int, ...]:
    """Return the process IDs of an engine's container; empty if the unit has no process.

    The unit's main process is conmon, their parent; it is left out.
    """
    if state.main_pid is None:
        return ()
    return procfs.descendants(procfs.processes(context.machine), state.main_pid)[1:]


def take_snapshot(
    context: Context,
    generation: Generation,
    *,
    timeout_s: float,
    threads_too: bool = True,
    numbers_too: bool = True,
) -> EngineSnapshot:
    """Take a snapshot; the engine has ``timeout_s`` seconds for each of its metrics pages."""
    metrics, late = (
        scrape_metrics(generation, timeout_s=timeout_s) if numbers_too else (None, False)
    )
    state = context.systemd.state(generation.units.service)
    return EngineSnapshot(
        unit=state,
        metrics=metrics,
        late=late,
        threads=procfs.thread_times(
            context.machine, engine_pids(context, state) if threads_too else ()
        ),
    )


def ended_meanwhile(stack: str) -> StackctlError:
    """Return the error about a stack that ended while it was inspected."""
    text, hint = f"{stack} ended during the inspection", f"stackctl status {stack}"
    return StackctlError(text, hint=hint, exit_code=ExitCode.NOT_RUNNING)


def work_between(before: EngineSnapshot, after: EngineSnapshot) -> EngineWork:
    """Return the work of an engine between two snapshots."""
    cpu_s = None
    if before.unit.cpu_s is not None and after.unit.cpu_s is not None:
        # The counter of a restarted unit begins at zero.
        cpu_s = max(0.0, after.unit.cpu_s - before.unit.cpu_s)
    counted = False
    if before.metrics is not None and after.metrics is not None:
        pairs = zip(before.metrics.counters, after.metrics.counters, strict=True)
        counted = any(None not in pair and pair[0] != pair[1] for pair in pairs)
    return EngineWork(interval_s=after.at_s - before.at_s, cpu_s=cpu_s, counted=counted)


def cpu_time(
    before: procfs.TimesByThread,
    after: procfs.TimesByThread,
    interval_s: float,
    allowed: int | None,
) -> CpuTime:
    """Return the CPU time of threads between two snapshots.

    A new thread counts from its start; a thread that ended does not count. ``allowed`` is the
    number of CPUs that the threads may use (None: unknown).
    """
    spans = [now.since(before.get(thread)) for thread, now in after.items()]
    least_ns = _BUSY * interval_s * 1e9
    return CpuTime(
        interval_s=interval_s,
        ran_s=sum(span.computed_ns for span in spans) / 1e9,
        waited_s=sum(span.waited_ns for span in spans) / 1e9,
        threads=len(spans),
        # A thread that waits for a CPU counts as busy.
        busy=sum(span.computed_ns + span.waited_ns >= least_ns for span in spans),
        allowed=allowed,
    )


def scrape_metrics(
    generation: Generation, *, timeout_s: float
) -> tuple[EngineMetrics | None, bool]:
    """Read the metrics of a generation's engine; see endpoint.scrape."""
    plan = generation.plan
    return endpoint.scrape(
        plan.engine_listen_port, engine(plan.engine), plan.argv, timeout_s=timeout_s
    )


def log_lines(context: Context, generation: Generation, since: float, most: int) -> list[str]:
    """Return the last ``most`` lines of an engine's log since a time (seconds since 1970).

    Lines from before the generation's creation are left out: if the state folder was lost, an older
    generation had the same number.
    """
    identifier = render.log_identifier(generation.stack, generation.number)
    since = max(since, datetime.datetime.fromisoformat(generation.created).timestamp())
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=most)
