"""Looks at a running engine: its numbers, and what its processes spend."""

from __future__ import annotations

import time
from dataclasses import dataclass

from stackctl.deploy.context import Context
from stackctl.engines import engine
from stackctl.health import endpoint
from stackctl.machine import http
from stackctl.observe.processes import Threads, below, threads
from stackctl.units import render
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics

_PROPERTIES = ("ActiveState", "MainPID", "CPUUsageNSec", "ActiveEnterTimestampMonotonic")


@dataclass(frozen=True)
class Look:
    """One look, ``at_s`` on the monotonic clock. ``metrics`` is None where the engine did not tell
    (``late``: not in time). ``cpu_s`` is the processor time of the unit so far; None: not counted.
    ``state`` is systemd's.
    """

    at_s: float
    metrics: EngineMetrics | None
    late: bool
    cpu_s: float | None
    threads: Threads
    state: str | None


def unit(context: Context, generation: Generation) -> dict[str, str]:
    """What systemd says of an engine's unit."""
    return context.systemd.show(generation.units.service, *_PROPERTIES)


def pids(context: Context, seen: dict[str, str]) -> tuple[int, ...]:
    """The processes of an engine's container. The unit's main process is conmon, their parent."""
    main = seen.get("MainPID", "")
    return below(context.machine, int(main)) if main.isdecimal() and int(main) > 0 else ()


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
        threads=threads(context.machine, pids(context, seen) if threads_too else ()),
        state=seen.get("ActiveState"),
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
    """The newest lines that an engine wrote since a time (seconds since 1970)."""
    identifier = render.log_identifier(generation.stack, generation.number)
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=most)
