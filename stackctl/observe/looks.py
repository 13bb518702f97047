"""Looks at a running engine: its numbers, and what its processes spend."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass

from stackctl.deploy.context import Context
from stackctl.engines import engine
from stackctl.health import endpoint
from stackctl.machine import http
from stackctl.observe import procfs
from stackctl.units import render
from stackctl.values.diagnosis import CpuTime
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics

#: The share of the time from which a thread is busy.
_BUSY = 0.25
_PROPERTIES = ("ActiveState", "MainPID", "CPUUsageNSec", "ActiveEnterTimestampMonotonic")


@dataclass(frozen=True)
class Look:
    """One look, ``at_s`` on the monotonic clock. ``metrics`` is None where the engine did not tell
    (``late``: not in time). ``cpu_s`` is the processor time of the unit so far; None: not counted.
    ``threads`` are by process and thread. ``state`` is systemd's.
    """

    at_s: float
    metrics: EngineMetrics | None
    late: bool
    cpu_s: float | None
    threads: Mapping[tuple[int, int], procfs.Times]
    state: str | None


def unit(context: Context, generation: Generation) -> dict[str, str]:
    """What systemd says of an engine's unit."""
    return context.systemd.show(generation.units.service, *_PROPERTIES)


def pids(context: Context, seen: dict[str, str]) -> tuple[int, ...]:
    """The processes of an engine's container. The unit's main process is conmon, their parent."""
    main = seen.get("MainPID", "")
    return procfs.tree(procfs.processes(context.machine), int(main))[1:] if main.isdecimal() else ()


def look(
    context: Context, generation: Generation, *, timeout_s: float, threads_too: bool = True
) -> Look:
    """Look once."""
    seen = unit(context, generation)
    used = seen.get("CPUUsageNSec", "")
    metrics, late = scrape(generation, timeout_s=timeout_s)
    return Look(
        at_s=time.monotonic(),
        metrics=metrics,
        late=late,
        cpu_s=int(used) / 1e9 if used.isdecimal() else None,
        threads=procfs.all_times(context.machine, pids(context, seen) if threads_too else ()),
        state=seen.get("ActiveState"),
    )


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
    """The numbers of an engine, and whether it was too late with them."""
    plan = generation.plan
    kind, answers = engine(plan.engine), {}
    for path in kind.metrics_paths:
        answer = http.get(endpoint.base_url(plan.listens) + path, timeout_s=timeout_s)
        if isinstance(answer, http.NoAnswer):
            return None, answer.late
        if answer.status == 200:
            answers[path] = answer.text
    return kind.measure(answers, plan.argv) if "/metrics" in answers else None, False


def log_lines(context: Context, generation: Generation, since: float, most: int) -> list[str]:
    """The newest lines that an engine wrote since a time (seconds since 1970).

    Not what came before the generation: where state was lost, its number was another one's.
    """
    identifier = render.log_identifier(generation.stack, generation.number)
    since = max(since, datetime.datetime.fromisoformat(generation.created).timestamp())
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=most)
