"""The present state of stacks, from systemd, Podman, the endpoint and the records."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stackctl.deploy import gpu_access, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.guard_timer import TIMER
from stackctl.deploy.stack_state import installed_generation
from stackctl.deploy.startup import failure_cause
from stackctl.engines import engine
from stackctl.errors import StackctlError
from stackctl.health import endpoint
from stackctl.machine import podman
from stackctl.machine.systemd import UnitState
from stackctl.observe import engine_snapshot
from stackctl.observe.drift import find_drift
from stackctl.state import logs
from stackctl.units import render
from stackctl.units.proxy_unit import proxy_service
from stackctl.values.generation import Generation
from stackctl.values.history import HealthEntry, StackState, StackStatus, StatusReport

_LOG_LINES = 200
#: Seconds that the endpoint has for an answer.
_ANSWER_S = 2
#: A pair of no cause and no remedy.
_NOTHING = (None, None)
_SAYS = {
    "loading": "it says that it loads its model",
    "unwell": "it says that its engine has ended",
    "closed": "its port is closed",
}


def status_report(context: Context, stacks: Sequence[str]) -> StatusReport:
    """Return the status of several stacks, with one query to systemd and one to Podman."""
    if not stacks:
        return StatusReport(scope=context.paths.scope, stacks=())
    generations = {stack: _generation(context, stack) for stack in stacks}
    known = [generation for generation in generations.values() if generation is not None]
    doors = [proxy_service(generation.stack) for generation in known if generation.door is not None]
    services = {
        stack: generation.units.service if generation else render.service_name(stack)
        for stack, generation in generations.items()
    }
    units = context.systemd.states((*services.values(), *doors, TIMER))
    try:
        containers = podman.inspect_containers([one.units.container for one in known])
    except StackctlError as error:
        context.progress.warn(error.message, error.hint)
        containers = {}
    found = []
    for stack, generation in generations.items():
        unit = units[services[stack]]
        if generation is None:
            found.append(
                StackStatus(
                    stack=stack, state="unknown", unit=services[stack], unit_state=unit.active
                )
            )
            continue
        door = units[proxy_service(stack)].active if generation.door else None
        container = containers.get(generation.units.container)
        found.append(_status(context, generation, unit, door, container))
    return StatusReport(
        scope=context.paths.scope, guard=units[TIMER].is_active, stacks=tuple(found)
    )


def stack_url(generation: Generation) -> str:
    """Return the address of a stack for clients."""
    proxy = generation.door
    return endpoint.base_url(generation.plan.port, proxy.address if proxy else "127.0.0.1")


def _generation(context: Context, stack: str) -> Generation | None:
    try:
        files = unit_files.installed(context, stack)
        if unit_files.engine_file(stack, files) is None:
            # The unit file was removed by hand, so the last generation that was ready is reported.
            for number in reversed(context.generations.numbers(stack)):
                generation = context.generations.read(stack, number)
                if generation.outcome.state == "ready":
                    return generation
        return installed_generation(context, stack)
    except StackctlError as error:
        # One damaged record must not hide the other stacks.
        context.progress.warn(error.message, error.hint)
        return None


def _status(
    context: Context,
    generation: Generation,
    unit: UnitState,
    door_state: str | None,
    container: podman.Container | None,
) -> StackStatus:
    plan, proxy = generation.plan, generation.door
    state, cause, remedy = _state(context, generation, unit)
    if state == "ready" and proxy is not None and door_state != "active":
        state, cause = "not answering", "the front door is not open"
    if state not in ("ready", "starting"):
        again = f"stackctl restart {generation.stack}"
        remedy = f"{remedy}; then {again}" if remedy else again
    return StackStatus(
        stack=generation.stack,
        profile=plan.profile,
        objective=plan.objective,
        engine=plan.engine,
        generation=generation.number,
        state=state,
        cause=cause,
        remedy=remedy,
        unit=generation.units.service,
        unit_state=unit.active,
        container=generation.units.container,
        container_state=container.state if container else None,
        container_health=container.health if container else None,
        door=proxy_service(generation.stack) if proxy else None,
        door_state=door_state,
        since=unit.since,
        restarts=unit.restarts,
        endpoint=stack_url(generation),
        model=plan.served_name,
        image=plan.image,
        health=_last_health(context, generation),
        # During a start the files are still being written.
        drift=tuple(
            one.text
            for one in find_drift(context, generation, unit, container.pid if container else 0)
        )
        if generation.outcome.state != "starting"
        else (),
    )


def _state(
    context: Context, generation: Generation, state: UnitState
) -> tuple[StackState, str | None, str | None]:
    """Return the state, the cause if it is bad, and the remedy beside a restart."""
    match state.active:
        case "activating" | "reloading":
            if state.sub == "start-pre":
                known = gpu_access.device_failure(_log(context, generation, state), waits=True)
                if known is None:
                    return "starting", *_NOTHING
                return "starting", f"waits for its GPU: {known.cause}", known.remedy
            failing = state.sub == "auto-restart" or bool(state.restarts)
            return "starting", *(_why_failed(context, generation, state) if failing else _NOTHING)
        case "failed":
            why, remedy = _why_failed(context, generation, state)
            if starts := state.gave_up_after:
                return "crash loop", f"gave up after {starts} starts: {why}", remedy
            return "failed", why, remedy
        case "active":
            return *_answering(context, generation, state), None
        case _:
            return "stopped", *_NOTHING


def _why_failed(
    context: Context, generation: Generation, state: UnitState
) -> tuple[str, str | None]:
    """Return the cause of a failed start, and the remedy if the machine is at fault."""
    lines = _log(context, generation, state)
    if known := gpu_access.device_failure(lines):
        return known.cause, known.remedy
    return failure_cause(engine(generation.plan.engine).failure(lines), state), None


def _log(context: Context, generation: Generation, state: UnitState) -> list[str]:
    """Return the unit's log since the last start of its main process.

    The time of InactiveExit is no substitute: it is renewed when the unit only waits for another
    start, after the lines about the failure.
    """
    since = time.time() - time.monotonic() + state.main_started_s
    return engine_snapshot.log_lines(context, generation, since, _LOG_LINES)


def _answering(
    context: Context, generation: Generation, state: UnitState
) -> tuple[StackState, str | None]:
    path = engine(generation.plan.engine).health_path
    alive = endpoint.liveness(generation.plan.engine_listen_port, path, timeout_s=_ANSWER_S)
    if alive == "ready":
        return "ready", None
    if alive in _SAYS:
        return "not answering", _SAYS[alive]
    done = engine_snapshot.work_between(
        engine_snapshot.EngineSnapshot(unit=state),
        engine_snapshot.EngineSnapshot(unit=context.systemd.state(generation.units.service)),
    )
    if done.is_working is None:
        return "not answering", None
    if done.is_working:
        used = f"{done.cpu_s or 0:.1f} s of processor time in {done.interval_s:.1f} s"
        return "not answering", f"but busy: {used}"
    return "not answering", "and it does not compute"


def _last_health(context: Context, generation: Generation) -> HealthEntry | None:
    """Return the last check of this generation; None without one, or if it cannot be read."""
    try:
        seen = logs.last_health(context.paths.state, generation.stack)
    except StackctlError as error:
        context.progress.warn(error.message, error.hint)
        return None
    return seen if seen is not None and seen.generation == generation.number else None
