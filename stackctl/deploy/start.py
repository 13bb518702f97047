"""Starts a unit and follows it until it is ready, has failed, or takes too long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stackctl.deploy import gpu
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.engines.protocol import Engine, Failure
from stackctl.errors import DidNotStart
from stackctl.health import endpoint
from stackctl.machine.unitstate import UnitState
from stackctl.quantity import format_duration
from stackctl.units.render import log_identifier
from stackctl.values.generation import Fact, Generation

_LEAST_POLL_S, _MOST_POLL_S = 0.05, 0.5
#: How often the log is read for what the engine does.
_PHASE_S = 0.5
_SHOWN_LINES = 8
#: How long to look for the cause of a failure before telling only what is known: with some lines of
#: the engine, and with none, which on a busy machine means that they are still to come.
_JOURNAL_S, _SILENT_JOURNAL_S = 2, 8
#: Progress gives a start at least so many seconds more, up to systemd's ceiling.
_STEP_S = 300
#: An engine whose log says that it is dead has so long to end by itself, and to say why.
_DYING_S = 10
#: A traceback for each of an engine's processes, and all that they say when they end.
_LOG_LINES = 3000

#: systemd's result of a service, in words. The engine's own log comes first where it says more.
_RESULTS = {
    "timeout": "it was not ready within systemd's time limit",
    "oom-kill": "the kernel killed it: out of memory",
    "signal": "it was killed by a signal",
    "core-dump": "it crashed",
    "watchdog": "its watchdog fired",
    "start-limit-hit": "it failed too often in a row",
    "resources": "systemd could not prepare it (disk full, or no more processes)",
    "protocol": "it ended before it was ready",
}
#: Exit statuses of ``podman run`` itself.
_STATUS = {125: "Podman could not start the container", 126: "the engine cannot be executed",
           127: "the image does not hold the engine", 137: "it was killed (out of memory?)",
           132: "the image was built for a newer CPU than this one"}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A start that was asked for: when, on the wall clock and on the monotonic one (seconds), and
    systemd's run of the unit before it (None: whatever runs is ours)."""

    since: float
    began: float
    before: str | None


def begin(context: Context, generation: Generation, *, restart: bool = False) -> Start:
    """Ask systemd to start the generation's service; with ``restart`` one that runs is stopped
    first, in the same job of systemd's."""
    service = generation.units.service
    # An earlier start of this generation may have failed for another reason.
    since, began = time.time(), time.monotonic()
    context.systemd.reset_failed(service)
    if not restart:
        context.systemd.start(service)
        return Start(since, began, None)
    before = context.systemd.state(service).invocation
    context.systemd.restart(service)
    return Start(since, began, before)


def wait(
    context: Context,
    generation: Generation,
    start: Start,
    *,
    deadline_s: float,
    active: bool,
    answered: bool = False,
) -> float:
    """Wait until the engine of a start answers, and with ``active`` until systemd knows it as well.

    Podman looks at the engine once a second before it tells systemd, so who answers is often not
    active yet. Before Podman 4.6 it is the other way round: active long before it answers.
    ``answered``: it has answered before, so a failure is not one of its start.

    Returns:
        Seconds since the start.

    Raises:
        DidNotStart: the cause in one line, the end of the engine's log, what to do.
    """
    plan, service = generation.plan, generation.units.service
    engine, port = find_engine(plan.engine), plan.listens
    watch = _Watch(deadline_s, 0 if _asked_for(generation) else _STEP_S)
    asked = start.began
    while True:
        state = context.systemd.state(service)
        elapsed = time.monotonic() - start.began
        # What systemd says of the run before this one is not about us.
        begun = start.before is None or state.invocation != start.before
        if begun and state.has_failed:
            raise explain(context, generation, engine, state, start.since, answered=answered)
        runs = ("active",) if active else ("active", "activating")
        if (
            begun
            and state.active in runs
            and endpoint.liveness(port, engine.health_path) == "ready"
        ):
            return elapsed
        if elapsed > watch.deadline_s:
            raise _too_late(context, generation, engine, watch.deadline_s, start.since)
        if watch.dead_s is not None and elapsed > watch.dead_s + _DYING_S:
            # Its parent still answers systemd, and may do so for hours.
            raise explain(context, generation, engine, state, start.since, answered=answered)
        if time.monotonic() - asked >= _PHASE_S:
            asked = time.monotonic()
            phase = _look(context, generation, engine, start.since, watch, elapsed)
            context.report.progress("start", phase, elapsed_s=elapsed)
        # Of a start that takes long a little more is not noticed.
        time.sleep(min(_MOST_POLL_S, max(_LEAST_POLL_S, elapsed / 50)))


def start_and_wait(
    context: Context, generation: Generation, *, deadline_s: float, restart: bool = False
) -> float:
    """``begin``, then ``wait`` until it answers and is active."""
    start = begin(context, generation, restart=restart)
    return wait(context, generation, start, deadline_s=deadline_s, active=True)


@dataclass
class _Watch:
    """What was seen of a start: its phases, the time it has, and since when its engine is dead.

    Only what an engine that hangs cannot give counts as progress: a phase, or a percentage of one,
    that was not seen before. It may well go on computing, and complaining in its log.
    """

    deadline_s: float
    step_s: float
    phases: set[str] = field(default_factory=set)
    dead_s: float | None = None

    def saw(self, phase: str, elapsed: float) -> None:
        """Note a phase; a new one gives the start more time."""
        if phase not in self.phases:
            self.phases.add(phase)
            self.deadline_s = max(self.deadline_s, elapsed + self.step_s)


def _asked_for(generation: Generation) -> bool:
    """Whether the user said how long the start may take: that is then all it gets."""
    decisions = generation.plan.decisions
    return any(d.field == "start-deadline" and d.source == "override" for d in decisions)


def _look(
    context: Context,
    generation: Generation,
    engine: Engine,
    since: float,
    watch: _Watch,
    elapsed: float,
) -> str:
    """What the engine does now."""
    alive = endpoint.liveness(generation.plan.listens, engine.health_path, timeout_s=1)
    if alive == "ready":
        return "answering, waiting for systemd"
    lines = _log(context, generation, since, lines=400)
    told = [phase for line in lines if (phase := engine.phase(line))]
    for phase in told:
        watch.saw(phase, elapsed)
    if watch.dead_s is None and (alive == "unwell" or engine.dead(lines)):
        watch.dead_s = elapsed
    if watch.dead_s is not None:
        return "its engine has ended, waiting for the reason"
    return told[-1] if told else "loading model" if alive == "loading" else "starting"


def _log(
    context: Context, generation: Generation, since: float, lines: int = _LOG_LINES
) -> list[str]:
    identifier = log_identifier(generation.stack, generation.number)
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=lines)


def said(context: Context, generation: Generation, since: float) -> tuple[Fact, ...]:
    """What an engine told of itself in the log of a start, and over HTTP."""
    engine = find_engine(generation.plan.engine)
    facts = engine.said(_log(context, generation, since))
    return (*endpoint.report(generation.plan.listens, engine.reports), *facts)


def explain(
    context: Context,
    generation: Generation,
    engine: Engine,
    state: UnitState,
    since: float,
    *,
    answered: bool = False,
) -> DidNotStart:
    """Why a service failed: from the engine's log where it is known, else from systemd's result.

    ``since`` is the time of its start. ``answered``: it had started, and failed after its first
    answer.
    """
    asked = time.monotonic()
    lines = _log(context, generation, since)
    # The journal is written a little later than the state changes.
    while (known := gpu.failure(lines) or engine.failure(lines)) is None:
        if time.monotonic() - asked > (_JOURNAL_S if lines else _SILENT_JOURNAL_S):
            break
        time.sleep(_MOST_POLL_S)
        lines = _log(context, generation, since)
    return _did_not_start(
        f"{generation.stack} did not {'last' if answered else 'start'}: {cause_of(known, state)}",
        generation,
        lines,
        known,
    )


def cause_of(known: Failure | None, state: UnitState) -> str:
    """Why a service ended, in words: what its engine's log told, else what systemd saw of it."""
    status = state.exit_status
    return (
        (known.cause if known else None)
        or _STATUS.get(status or 0)
        or _RESULTS.get(state.result or "")
        or (f"it exited with status {status}" if status else None)
        or "it ended before it was ready"
    )


def _too_late(
    context: Context, generation: Generation, engine: Engine, deadline_s: float, since: float
) -> DidNotStart:
    lines = _log(context, generation, since)
    known = engine.failure(lines)
    doing = next((phase for line in reversed(lines) if (phase := engine.phase(line))), None)
    message = f"{generation.stack} was not healthy within {format_duration(deadline_s)}"
    if known is None and doing is not None:
        message += f"; last seen: {doing}"
    return _did_not_start(message, generation, lines, known, usual="more time: --timeout 30m")


def _did_not_start(
    message: str,
    generation: Generation,
    lines: Sequence[str],
    known: Failure | None,
    usual: str | None = None,
) -> DidNotStart:
    error = DidNotStart(
        message,
        details=_tail(lines, known.evidence if known else None),
        hint=_hint(generation, (known.remedy if known else None) or usual),
    )
    if known is not None:
        error.cause, error.sets, error.kernel = known.cause, known.sets, known.kernel
    return error


def _tail(lines: Sequence[str], evidence: str | None) -> list[str]:
    # A known cause needs its evidence only; the log has the rest.
    count = _SHOWN_LINES if evidence is None else 3
    shown = [line.strip() for line in lines[-count:]]
    if evidence is not None and evidence not in shown:
        shown.insert(0, evidence)
    return shown or [
        "no log: the engine wrote nothing, or this user may not read the journal "
        "(usermod -aG systemd-journal USER)"
    ]


def _hint(generation: Generation, remedy: str | None) -> str:
    log = f"log: stackctl logs {generation.stack} --generation {generation.number}"
    return f"{remedy}\n{log}" if remedy else log
