"""Starts a unit, follows it until it is ready or has failed, tests its answers, and stops it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from stackctl.deploy import gpu_access
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.engines.failures import Failure
from stackctl.errors import StartFailed
from stackctl.health import completion_check, endpoint
from stackctl.machine import podman
from stackctl.machine.systemd import UnitState
from stackctl.quantity import format_duration
from stackctl.units import render
from stackctl.values.generation import EngineFact, Generation
from stackctl.values.result import Result

_LEAST_POLL_S, _MOST_POLL_S = 0.05, 0.5
#: Seconds between two readings of the log for the engine's phase.
_PHASE_S = 0.5
_SOAK_POLL_S = 0.25
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

#: An engine without an answer for so many seconds does not serve. With less, an engine that is only
#: busy would be restarted or replaced.
_ANSWER_S = 20

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
    plan = generation.plan
    health_path = find_engine(plan.engine).health_path
    watch = _Watch(context, generation, start.since, deadline_s)
    asked = start.began
    while True:
        state = context.systemd.state(generation.units.service)
        elapsed = time.monotonic() - start.began
        # The state may still be that of the previous run.
        begun = start.before is None or state.invocation != start.before
        if begun and state.has_failed:
            raise start_failure(context, generation, state, start.since, answered=answered)
        runs = ("active",) if active else ("active", "activating")
        if (
            begun
            and state.active in runs
            and endpoint.liveness(plan.engine_listen_port, health_path) == "ready"
        ):
            return elapsed
        if elapsed > watch.deadline_s:
            raise watch.too_late()
        if watch.dead_s is not None and elapsed > watch.dead_s + _DYING_S:
            # Its parent process may run on for hours, so systemd sees no failure.
            raise start_failure(context, generation, state, start.since, answered=answered)
        if time.monotonic() - asked >= _PHASE_S:
            asked = time.monotonic()
            context.progress.progress("start", watch.phase(elapsed), elapsed_s=elapsed)
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

    ``since`` is on the wall clock; other times are seconds since the start. Only a new phase, or a
    new percentage of a phase, counts as progress: an engine that hangs may go on computing and
    logging.
    """

    context: Context
    generation: Generation
    since: float
    deadline_s: float
    phases: set[str] = field(default_factory=set)
    dead_s: float | None = None

    def phase(self, elapsed: float) -> str:
        """Return the phase of the engine as text; a new phase in its log extends the deadline."""
        plan = self.generation.plan
        engine = find_engine(plan.engine)
        alive = endpoint.liveness(plan.engine_listen_port, engine.health_path, timeout_s=1)
        if alive == "ready":
            return "answering, waiting for systemd"
        lines = _log(self.context, self.generation, self.since, lines=400)
        told = [phase for line in lines if (phase := engine.phase(line))]
        # Progress does not extend a deadline that the user set.
        asked = any(d.field == "start-deadline" and d.source == "override" for d in plan.decisions)
        if not self.phases.issuperset(told):
            self.phases.update(told)
            self.deadline_s = max(self.deadline_s, elapsed + (0 if asked else _STEP_S))
        if self.dead_s is None and (alive == "unwell" or engine.has_crashed(lines)):
            self.dead_s = elapsed
        if self.dead_s is not None:
            return "its engine has ended, waiting for the reason"
        return told[-1] if told else "loading model" if alive == "loading" else "starting"

    def too_late(self) -> StartFailed:
        """Return the error of a start that has exceeded its deadline."""
        lines = _log(self.context, self.generation, self.since)
        engine = find_engine(self.generation.plan.engine)
        known = engine.failure(lines)
        doing = next((phase for line in reversed(lines) if (phase := engine.phase(line))), None)
        limit = format_duration(self.deadline_s)
        message = f"{self.generation.stack} was not healthy within {limit}"
        if known is None and doing is not None:
            message += f"; last seen: {doing}"
        remedy = known.remedy if known else None
        remedy = remedy or "more time: --timeout 30m"
        return _did_not_start(message, self.generation, lines, known, remedy)


def _log(
    context: Context, generation: Generation, since: float, lines: int = _LOG_LINES
) -> list[str]:
    identifier = render.log_identifier(generation.stack, generation.number)
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
    state: UnitState,
    since: float,
    *,
    answered: bool = False,
) -> StartFailed:
    """Return the error of a failed service, with the cause from its log or systemd's result.

    ``since`` is the time of its start on the wall clock. With ``answered`` the service failed after
    its first answer.
    """
    asked, engine = time.monotonic(), find_engine(generation.plan.engine)
    lines = _log(context, generation, since)
    # The lines reach the journal a little after the state has changed.
    while (known := gpu_access.device_failure(lines) or engine.failure(lines)) is None:
        if time.monotonic() - asked > (_JOURNAL_S if lines else _SILENT_JOURNAL_S):
            break
        time.sleep(_MOST_POLL_S)
        lines = _log(context, generation, since)
    verb = "last" if answered else "start"
    message = f"{generation.stack} did not {verb}: {failure_cause(known, state)}"
    return _did_not_start(message, generation, lines, known, known.remedy if known else None)


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


def _did_not_start(
    message: str,
    generation: Generation,
    lines: list[str],
    known: Failure | None,
    remedy: str | None,
) -> StartFailed:
    # A known cause needs its evidence only; the log has the rest.
    shown = [line.strip() for line in lines[-(3 if known else _SHOWN_LINES) :]]
    if known is not None and known.evidence not in shown:
        shown.insert(0, known.evidence)
    if not shown:
        shown = [
            "no log: the engine wrote nothing, or this user may not read the journal "
            "(usermod -aG systemd-journal USER)"
        ]
    log = f"log: stackctl logs {generation.stack} --generation {generation.number}"
    error = StartFailed(message, details=shown, hint=f"{remedy}\n{log}" if remedy else log)
    if known is not None:
        error.cause, error.sets, error.kernel = known.cause, known.sets, known.kernel
    return error


def is_serving(context: Context, generation: Generation) -> bool:
    """Return True if a generation is active and its engine answers in ``_ANSWER_S`` seconds."""
    state = context.systemd.show(generation.units.service, "ActiveState")["ActiveState"]
    path, port = find_engine(generation.plan.engine).health_path, generation.plan.engine_listen_port
    return state == "active" and endpoint.liveness(port, path, timeout_s=_ANSWER_S) == "ready"


def is_starting(context: Context, generation: Generation) -> bool:
    """Return True if systemd is starting the unit, and does not wait before the next attempt."""
    seen = context.systemd.show(generation.units.service, "ActiveState", "SubState")
    return seen.get("ActiveState") == "activating" and seen.get("SubState", "").startswith("start")


def stop_unit(context: Context, unit: str) -> None:
    """Stop a unit if there is one, and remove its container."""
    service = render.service_name(unit)
    seen = context.systemd.show(service, "LoadState", "ActiveState")
    if seen.get("LoadState") == "not-found" and seen.get("ActiveState") == "inactive":
        # The unit is gone, but its container may still run: it is removed below.
        pass
    elif seen.get("ActiveState") == "activating":
        context.systemd.abort(service)
    else:
        context.systemd.stop(service)
    # The stop of the unit removes the container, but an interrupted stop may leave it.
    podman.remove_container(render.container_name(unit))
    context.systemd.reset_failed(service)


def require_engine_answer(context: Context, generation: Generation) -> None:
    """Check the engine's health, its model list and one completion, without its front door.

    Raises:
        StartFailed: a check failed; ``kernel`` is set if the answer was not text.
    """
    plan = generation.plan
    context.progress.progress("answer", "asking for a completion")
    results = endpoint.check_endpoint(
        endpoint.base_url(plan.engine_listen_port),
        find_engine(plan.engine).health_path,
        plan.served_name,
        answer_timeout_s=plan.timing.deadline_s,
        parameters=plan.model.parameters,
    )
    failed = next((result for result in results if result.status == "fail"), None)
    if failed is not None:
        error = _wrong(generation, failed)
        # Wrong arithmetic shows as garbage; other kernels of the image may compute correctly.
        error.kernel = failed.code == "not-text"
        raise error
    context.progress.step("answer", f"ok     {results[-1].actual}")


def check_stop_and_streaming(context: Context, generation: Generation) -> None:
    """Check the ends of answers and a stream, when clients are served already.

    Raises:
        StartFailed: a check failed.
    """
    plan = generation.plan
    context.progress.progress("answer", "asking for a stream, and for answers that end early")
    probe = completion_check.CompletionProbe(
        endpoint.base_url(plan.engine_listen_port),
        plan.served_name,
        plan.timing.deadline_s,
        parameters=plan.model.parameters,
    )
    for result in completion_check.extended_checks(probe):
        if result.status == "fail":
            raise _wrong(generation, result)


def soak(context: Context, generation: Generation, seconds: float) -> None:
    """Watch the new engine for a while, because its first real requests may crash it.

    Raises:
        StartFailed: the engine has ended or was restarted.
    """
    started, since = time.monotonic(), time.time()
    while (elapsed := time.monotonic() - started) < seconds:
        context.progress.progress(
            "soak", f"{format_duration(elapsed)} of {format_duration(seconds)}"
        )
        state = context.systemd.state(generation.units.service)
        if not state.is_active or state.restarts:
            raise start_failure(context, generation, state, since - seconds, answered=True)
        time.sleep(_SOAK_POLL_S)


def _wrong(generation: Generation, failed: Result) -> StartFailed:
    stack = generation.stack
    expected = f"expected {failed.expected}" if failed.expected else None
    error = StartFailed(
        f"{stack} started, but {failed.name} is wrong: {failed.actual}",
        details=[line for line in (expected, failed.evidence) if line],
        hint=f"log: stackctl logs {stack} --generation {generation.number}",
    )
    error.cause = failed.actual
    return error
