"""The check of a running stack, and the guard, which checks all stacks and restarts dead engines.

A check covers the unit, the endpoint, the model and one real completion. An engine is dead if it
does not answer, uses no CPU time and counts no tokens, in two passes of the guard in a row. An
engine that answers late because it computes is healthy.
"""

from __future__ import annotations

import datetime
import os
import time

from stackctl.deploy import proxy, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_generation
from stackctl.diagnose.results import sort_by_severity
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import lock
from stackctl.machine.systemd import UnitState
from stackctl.observe import engine_snapshot
from stackctl.observe.status import stack_url
from stackctl.state import logs
from stackctl.state.generations import utc_now
from stackctl.units.proxy_unit import proxy_service
from stackctl.values.generation import Generation
from stackctl.values.history import GuardReport, GuardResult, HealthEntry
from stackctl.values.result import CheckReport, Result, Status

#: Seconds for which CPU time and counters are measured (values/metrics.py has the limit).
_WATCH_S = 5.0
#: The name in the health log for an engine that neither answers nor works.
_DEAD = "dead"
#: Two passes count as consecutive up to this distance, in seconds.
_IN_A_ROW_S = 900
#: Seconds that an engine has to report its metrics.
_ANSWER_S = 2


def check_stack(
    context: Context, generation: Generation, *, answer_timeout_s: float
) -> CheckReport:
    """Check unit, endpoint, model and one completion; failures come first.

    The endpoint is checked only if all units are active.
    """
    stack = generation.stack
    services = {"unit": generation.units.service}
    if generation.door is not None:
        services["door"] = proxy_service(stack)
    states = context.systemd.states(tuple(services.values()))
    results = [_unit(stack, name, states[service]) for name, service in services.items()]
    if all(result.status == "ok" for result in results):
        plan = generation.plan
        results += endpoint.check_endpoint(
            stack_url(generation),
            engine(plan.engine).health_path,
            plan.served_name,
            answer_timeout_s=answer_timeout_s,
            key=proxy.client_key(context, generation),
            parameters=plan.model.parameters,
        )
        if restarts := states[services["unit"]].restarts:
            results.append(
                Result(
                    name="restarts",
                    status="warn",
                    expected="0",
                    actual=str(restarts),
                    remedy=f"stackctl logs {stack} tells why",
                )
            )
    return CheckReport(stack=stack, results=sort_by_severity(results))


def health_entry(generation: Generation, report: CheckReport) -> HealthEntry:
    """Return the worst result of a check, as an entry of the health log."""
    worst, when, number = report.results[0], utc_now(), generation.number
    if worst.status not in ("fail", "warn"):
        return HealthEntry(when=when, generation=number, status="ok")
    return HealthEntry(
        when=when, generation=number, status=worst.status, name=worst.name, message=worst.actual
    )


def record_health(context: Context, stack: str, seen: HealthEntry) -> None:
    """Add an entry to the health log if the caller owns it; warn if it cannot be written."""
    try:
        owner = (context.paths.state / "stacks" / stack).stat().st_uid
    except FileNotFoundError:
        # The record of a running stack was lost.
        return
    except OSError as error:
        context.progress.warn(f"not in the history: {error}")
        return
    if owner != os.geteuid():
        return
    try:
        logs.record_health(context.paths.state, stack, seen)
    except StackctlError as error:
        context.progress.warn(f"not in the history: {error.message}")


def _unit(stack: str, name: str, state: UnitState) -> Result:
    active = state.is_active
    return Result(
        name=name,
        status="ok" if active else "fail",
        expected="active",
        actual=state.active,
        evidence=None if active else f"result {state.result}",
        remedy=None if active else f"stackctl logs {stack}; stackctl restart {stack}",
    )


def guard_stacks(context: Context, *, answer_timeout_s: float) -> GuardReport:
    """Check all stacks of the scope once. Skip stacks that are starting or being changed.

    A completion may take ``answer_timeout_s`` seconds.
    """
    return GuardReport(
        scope=context.paths.scope,
        stacks=tuple(
            _guarded(context, stack, answer_timeout_s)
            for stack in unit_files.installed_stacks(context)
        ),
    )


def _guarded(context: Context, stack: str, answer_timeout_s: float) -> GuardResult:
    began = time.time()
    if lock.lock_holder(context.paths.lock) is not None:
        return GuardResult(stack=stack, action="skipped")
    try:
        generation = installed_generation(context, stack)
    except StackctlError as error:
        seen = HealthEntry(when=utc_now(), status="fail", name="record", message=error.message)
        record_health(context, stack, seen)
        return GuardResult(stack=stack, health=seen)
    unit = context.systemd.state(generation.units.service)
    if unit.active in ("activating", "deactivating", "reloading"):
        return GuardResult(stack=stack, action="skipped")
    report = check_stack(context, generation, answer_timeout_s=answer_timeout_s)
    seen, worst = health_entry(generation, report), report.results[0]
    if lock.lock_holder(context.paths.lock) is not None:
        # A change began during the check and may have caused the result.
        return GuardResult(stack=stack, action="skipped")
    if worst.status == "fail" and worst.code == "no-answer":
        seen = _watch(context, generation, worst)
        if seen.name == _DEAD and _was_dead(context, generation, began):
            if not _restart(context, generation, unit.invocation):
                return GuardResult(stack=stack, action="skipped")
            record_health(context, stack, seen)
            return GuardResult(stack=stack, action="restarted", health=seen)
    record_health(context, stack, seen)
    return GuardResult(stack=stack, health=seen)


def _watch(context: Context, generation: Generation, worst: Result) -> HealthEntry:
    """Measure for some seconds if an engine that did not answer is working."""
    # An engine that does not answer at all does not report its counters either.
    numbers_too = worst.name != "endpoint"

    def look() -> engine_snapshot.EngineSnapshot:
        return engine_snapshot.take_snapshot(
            context, generation, timeout_s=_ANSWER_S, threads_too=False, numbers_too=numbers_too
        )

    before = look()
    time.sleep(_WATCH_S)
    done = engine_snapshot.work_between(before, look())
    status: Status
    silent = f"{worst.name}: {worst.actual}"
    if done.is_working:
        work = "it counts tokens" if done.counted else f"{done.cpu_s or 0:.1f} s of processor time"
        status, name, message = "ok", "busy", f"{silent}, but {work} in {_WATCH_S:.0f} s"
    elif done.is_working is None:
        # Without CPU accounting nothing proves that the engine stands still.
        status, name, message = "fail", worst.name, silent
    else:
        status, name, message = "fail", _DEAD, f"{silent}, and it does not compute"
    return HealthEntry(
        when=utc_now(), generation=generation.number, status=status, name=name, message=message
    )


def _was_dead(context: Context, generation: Generation, began: float) -> bool:
    """Return True if the previous pass found the same run of the engine dead.

    ``began`` is the start of the present pass, in seconds since 1970.
    """
    try:
        before = logs.last_health(context.paths.state, generation.stack)
    except StackctlError:
        return False
    if before is None or (before.name, before.generation) != (_DEAD, generation.number):
        return False
    running_s = context.systemd.state(generation.units.service).running_s or 0.0
    seen_at = datetime.datetime.fromisoformat(before.when).timestamp()
    # A pass of another watchdog at the same time is not a previous pass.
    return seen_at < began and time.time() - seen_at < min(_IN_A_ROW_S, running_s)


def _restart(context: Context, generation: Generation, invocation: str | None) -> bool:
    """Make systemd restart the engine; return False if it was replaced or the scope is locked."""
    stack, service = generation.stack, generation.units.service
    try:
        with lock.exclusive(context.paths.lock, f"guard {stack}"):
            if context.systemd.state(service).invocation != invocation:
                return False
            # A dead engine does not react to SIGTERM. systemd restarts it as after any failure, and
            # counts the restart.
            context.systemd.kill(service)
    except StackctlError as error:
        if error.exit_code == ExitCode.LOCKED:
            return False
        raise
    context.write_audit_entry(
        "restart",
        stack,
        generation=generation.number,
        message="by the guard: it neither answered nor computed, twice in a row",
    )
    return True
