"""The one reader of a running engine: its unit, its numbers, its log, and the CPU time it uses."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from stackctl.deploy.context import Context
from stackctl.engines import engine
from stackctl.health import endpoint
from stackctl.machine.unitstate import UnitState
from stackctl.observe import procfs
from stackctl.units import render
from stackctl.values.activity import is_working
from stackctl.values.diagnosis import CpuTime
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics

#: The share of the time from which a thread is busy.
_BUSY = 0.25


@dataclass(frozen=True)
class Look:
    """One look at a running engine. ``unit`` is the state of its unit; ``metrics`` is None if the
    engine did not report its numbers (``late``: not in time) or was not asked. ``threads`` are by
    process and thread.
    """

    unit: UnitState
    metrics: EngineMetrics | None = None
    late: bool = False
    threads: Mapping[tuple[int, int], procfs.Times] = field(default_factory=dict)

    @property
    def at_s(self) -> float:
        """The moment of the look, in seconds on the monotonic clock."""
        return self.unit.at_s


@dataclass(frozen=True)
class Work:
    """The work of an engine between two looks: its CPU time (None: not counted), and whether its
    counters of tokens moved."""

    interval_s: float
    cpu_s: float | None
    counted: bool

    @property
    def is_working(self) -> bool | None:
        """Whether the engine works; None if nothing shows it: an engine without counters on a
        machine that does not count CPU time."""
        if self.counted:
            return True
        return None if self.cpu_s is None else is_working(self.cpu_s, self.interval_s)


def unit(context: Context, generation: Generation) -> UnitState:
    """Return the state of an engine's unit."""
    return context.systemd.state(generation.units.service)


def pids(context: Context, state: UnitState) -> tuple[int, ...]:
    """Return the processes of an engine's container. The unit's main process is conmon, their
    parent."""
    if state.main_pid is None:
        return ()
    return procfs.tree(procfs.processes(context.machine), state.main_pid)[1:]


def look(
    context: Context,
    generation: Generation,
    *,
    timeout_s: float,
    threads_too: bool = True,
    numbers_too: bool = True,
) -> Look:
    """Look once; the engine has ``timeout_s`` to report its numbers."""
    metrics, late = scrape(generation, timeout_s=timeout_s) if numbers_too else (None, False)
    state = unit(context, generation)
    return Look(
        unit=state,
        metrics=metrics,
        late=late,
        threads=procfs.all_times(context.machine, pids(context, state) if threads_too else ()),
    )


def work(before: Look, after: Look) -> Work:
    """Return the work of an engine between two looks."""
    cpu_s = None
    if before.unit.cpu_s is not None and after.unit.cpu_s is not None:
        # A unit that was started again counts from zero.
        cpu_s = max(0.0, after.unit.cpu_s - before.unit.cpu_s)
    counted = False
    if before.metrics is not None and after.metrics is not None:
        pairs = zip(before.metrics.counters, after.metrics.counters, strict=True)
        counted = any(None not in pair and pair[0] != pair[1] for pair in pairs)
    return Work(interval_s=after.at_s - before.at_s, cpu_s=cpu_s, counted=counted)


def cpu_time(
    before: Mapping[tuple[int, int], procfs.Times],
    after: Mapping[tuple[int, int], procfs.Times],
    interval_s: float,
    allowed: int | None,
) -> CpuTime:
    """What threads did between two looks; those that began or ended meanwhile count where known."""
    none, spans = procfs.Times(0, 0), []
    for thread, now in after.items():
        was = before.get(thread, none)
        ran, waited = now.computed_ns - was.computed_ns, now.waited_ns - was.waited_ns
        spans.append((max(0, ran) / 1e9, max(0, waited) / 1e9))
    return CpuTime(
        interval_s=interval_s,
        ran_s=sum(ran for ran, _ in spans),
        waited_s=sum(waited for _, waited in spans),
        threads=len(spans),
        # One that waits for a core wants to be busy too.
        busy=sum(ran + waited >= _BUSY * interval_s for ran, waited in spans),
        allowed=allowed,
    )


def scrape(generation: Generation, *, timeout_s: float) -> tuple[EngineMetrics | None, bool]:
    """Read the numbers of a generation's engine; see endpoint.scrape."""
    plan = generation.plan
    return endpoint.scrape(plan.listens, engine(plan.engine), plan.argv, timeout_s=timeout_s)


def log_lines(context: Context, generation: Generation, since: float, most: int) -> list[str]:
    """The newest lines that an engine wrote since a time (seconds since 1970).

    Not what came before the generation: where state was lost, its number was another one's.
    """
    identifier = render.log_identifier(generation.stack, generation.number)
    since = max(since, datetime.datetime.fromisoformat(generation.created).timestamp())
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=most)
