"""Starts a unit and follows it until it is ready, has failed, or exceeds its deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stackctl.deploy import gpu_access
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.engines.protocol import Engine, Failure
from stackctl.errors import StartFailed
from stackctl.health import endpoint
from stackctl.machine.unit_state import UnitState
from stackctl.quantity import format_duration
from stackctl.units.render import log_identifier
from stackctl.values.generation import EngineFact, Generation

_LEAST_POLL_S, _MOST_POLL_S = 0.05, 0.5
#: Seconds between two readings of the log for the engine's phase.
_PHASE_S = 0.5
_SHOWN_LINES = 8
#: Seconds to search the log for the cause of a failure, if it has lines of the engine and if it has
#: none: on a busy machine they come late.
_JOURNAL_S, _SILENT_JOURNAL_S = 2, 8
#: After progress a start may take at least so many seconds more, up to systemd's ceiling.
_STEP_S = 300
#: Seconds for a dead engine to end by itself and to log the reason.
_DYING_S = 10
#: Enough for a traceback of each process of an engine, and for their last messages.
_LOG_LINES = 3000

#: systemd's results of a service, as text. A cause in the engine's log takes precedence.
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
class StartJob:
    """A start that systemd was asked for.

    ``since`` is its time in seconds on the wall clock, ``began`` on the monotonic clock. ``before``
    is the invocation id of the previous run after a restart; None if any run belongs to this start.
    """

    since: float
    began: float
    before: str | None


def start(context: Context, generation: Generation, *, restart: bool = False) -> StartJob:
    """Ask systemd to start the generation's service, and return without waiting.

    With ``restart`` systemd stops a running service first, in the same job.
    """
    service = generation.units.service
    # An earlier start of this generation may have failed for another reason.
    since, began = time.time(), time.monotonic()
    context.systemd.reset_failed(service)
    if not restart:
        context.systemd.start(service)
        return StartJob(since, began, None)
    before = context.systemd.state(service).invocation
    context.systemd.restart(service)
    return StartJob(since, began, before)


def wait_until_ready(
    context: Context,
    generation: Generation,
    start: StartJob,
    *,
    deadline_s: float,
    active: bool,
    answered: bool = False,
) -> float:
    """Wait until the engine answers, and with ``active`` also until its unit is active.

    Podman checks the engine's health once a second before it notifies systemd, so the engine often
    answers before its unit is active. With ``answered`` a failure is not reported as one of the
    start.

    Returns:
        The seconds since the start.

    Raises:
        StartFailed: with the cause in one line, the end of the engine's log and the remedy.
    """
    plan, service = generation.plan, generation.units.service
    engine, port = find_engine(plan.engine), plan.engine_listen_port
    watch = _Watch(deadline_s, 0 if _asked_for(generation) else _STEP_S)
    asked = start.began
    while True:
        state = context.systemd.state(service)
        elapsed = time.monotonic() - start.began
        # The state may still be that of the previous run.
        begun = start.before is None or state.invocation != start.before
        if begun and state.has_failed:
            raise start_failure(context, generation, engine, state, start.since, answered=answered)
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
            # Its parent process may run on for hours, so systemd sees no failure.
            raise start_failure(context, generation, engine, state, start.since, answered=answered)
        if time.monotonic() - asked >= _PHASE_S:
            asked = time.monotonic()
            phase = _current_phase(context, generation, engine, start.since, watch, elapsed)
            context.progress.progress("start", phase, elapsed_s=elapsed)
        # The longer a start takes, the less a late notice of its end matters.
        time.sleep(min(_MOST_POLL_S, max(_LEAST_POLL_S, elapsed / 50)))


def start_and_wait(
    context: Context, generation: Generation, *, deadline_s: float, restart: bool = False
) -> float:
    """Start the service, wait until its engine answers and is active, and return the seconds."""
    job = start(context, generation, restart=restart)
    return wait_until_ready(context, generation, job, deadline_s=deadline_s, active=True)


@dataclass
class _Watch:
    """Progress of a start: its phases, its deadline, and the time when its engine was found dead.

    All times are seconds since the start. Only a new phase, or a new percentage of a phase, counts
    as progress: an engine that hangs may go on computing and logging.
    """

    deadline_s: float
    step_s: float
    phases: set[str] = field(default_factory=set)
    dead_s: float | None = None

    def saw(self, phase: str, elapsed: float) -> None:
        """Record a phase; a new one extends the deadline."""
        if phase not in self.phases:
            self.phases.add(phase)
            self.deadline_s = max(self.deadline_s, elapsed + self.step_s)


def _asked_for(generation: Generation) -> bool:
    """Return True if the user set the deadline, which progress then does not extend."""
    decisions = generation.plan.decisions
    return any(d.field == "start-deadline" and d.source == "override" for d in decisions)


def _current_phase(
    context: Context,
    generation: Generation,
    engine: Engine,
    since: float,
    watch: _Watch,
    elapsed: float,
) -> str:
    """Return the phase of the engine as text, and record the phases in its log."""
    alive = endpoint.liveness(generation.plan.engine_listen_port, engine.health_path, timeout_s=1)
    if alive == "ready":
        return "answering, waiting for systemd"
    lines = _log(context, generation, since, lines=400)
    told = [phase for line in lines if (phase := engine.phase(line))]
    for phase in told:
        watch.saw(phase, elapsed)
    if watch.dead_s is None and (alive == "unwell" or engine.has_crashed(lines)):
        watch.dead_s = elapsed
    if watch.dead_s is not None:
        return "its engine has ended, waiting for the reason"
    return told[-1] if told else "loading model" if alive == "loading" else "starting"


def _log(
    context: Context, generation: Generation, since: float, lines: int = _LOG_LINES
) -> list[str]:
    identifier = log_identifier(generation.stack, generation.number)
    return context.systemd.journal(generation.units.service, identifier, since=since, lines=lines)


def engine_facts_after_start(
    context: Context, generation: Generation, since: float
) -> tuple[EngineFact, ...]:
    """Return the facts that an engine reports over HTTP and in the log since its start."""
    engine = find_engine(generation.plan.engine)
    facts = engine.facts_from_log(_log(context, generation, since))
    return (*endpoint.read_reports(generation.plan.engine_listen_port, engine.reports), *facts)


def start_failure(
    context: Context,
    generation: Generation,
    engine: Engine,
    state: UnitState,
    since: float,
    *,
    answered: bool = False,
) -> StartFailed:
    """Return the error of a failed service, with the cause from its log or systemd's result.

    ``since`` is the time of its start on the wall clock. With ``answered`` the service failed after
    its first answer.
    """
    asked = time.monotonic()
    lines = _log(context, generation, since)
    # The lines reach the journal a little after the state has changed.
    while (known := gpu_access.device_failure(lines) or engine.failure(lines)) is None:
        if time.monotonic() - asked > (_JOURNAL_S if lines else _SILENT_JOURNAL_S):
            break
        time.sleep(_MOST_POLL_S)
        lines = _log(context, generation, since)
    return _did_not_start(
        f"{generation.stack} did not {'last' if answered else 'start'}: "
        f"{failure_cause(known, state)}",
        generation,
        lines,
        known,
    )


def failure_cause(known: Failure | None, state: UnitState) -> str:
    """Return the reason why a service ended: its engine's log, else its exit status or result."""
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
) -> StartFailed:
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
) -> StartFailed:
    error = StartFailed(
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
