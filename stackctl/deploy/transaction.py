"""A change of a stack: it happens completely, or the machine is restored.

Every step is in the journal before it begins, and ``reconcile`` makes the machine run one given
generation, whatever its state is. So reverting a change, finishing it and recovering from a crash
are the same: decide which generation wins, and converge to it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from stackctl.deploy import deployment_records, proxy, readiness_checks, startup, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import InstalledStack
from stackctl.engines import engine as find_engine
from stackctl.errors import StackctlError, StartFailed
from stackctl.health import endpoint
from stackctl.machine import podman
from stackctl.machine.signals import ignore_signals
from stackctl.quantity import format_duration
from stackctl.state.generations import utc_now
from stackctl.state.journal import Journal
from stackctl.units import render
from stackctl.values.generation import EngineFact, Generation, GenerationState
from stackctl.values.transaction import Transaction

#: An engine without an answer for so many seconds does not serve. With less, an engine that is only
#: busy would be restarted or replaced.
_ANSWER_S = 20


@dataclass(frozen=True)
class RolloutTimeouts:
    """Time limits of a change, in seconds.

    ``drain_s`` is the longest wait for running requests to end, ``soak_s`` the time that the new
    engine is watched once it serves.
    """

    drain_s: float = 60.0
    soak_s: float = 5.0


def apply_generation(
    context: Context, new: Generation, before: InstalledStack, timeouts: RolloutTimeouts
) -> Generation:
    """Replace the present generation with a new one; if that fails, restore the present one.

    Returns:
        The generation as stored, ready.

    Raises:
        StackctlError: the cause of the failure; the stack is then as it was before.
    """
    change = Transaction(
        operation=new.operation,
        stack=new.stack,
        before=before.generation.number if before.generation else None,
        running=before.meant_to_run,
        after=new.number,
        step="store",
        started=utc_now(),
    )
    context.journal.write(change)
    try:
        context.generations.write(new)
        ready = _exchange(context, _Steps(context.journal, change), new, before, timeouts)
    except BaseException as error:
        with ignore_signals():
            _undo(context, new, before, error)
        raise
    with ignore_signals():
        done = _finish(context, new, before, ready)
        deployment_records.write_audit_entry(
            context, new.operation, new.stack, generation=new.number
        )
        return done


class _Steps:
    """The steps of one change; each is on disk before it begins."""

    def __init__(self, journal: Journal, change: Transaction) -> None:
        self._journal, self._change = journal, change

    def begin(self, name: str, *, committed: bool = False) -> None:
        """Write the name of the next step; with ``committed`` the change is no longer reverted."""
        self._change = self._journal.step(self._change, name, committed=committed)


def _exchange(
    context: Context,
    steps: _Steps,
    new: Generation,
    before: InstalledStack,
    timeouts: RolloutTimeouts,
) -> tuple[float, tuple[EngineFact, ...]]:
    """Make the new generation serve, up to the commit of the change.

    Returns:
        The seconds until it was ready, and the facts that its engine reports.
    """
    stack = new.stack
    steps.begin("install")
    early = new.door if before.is_stopped and not proxy.is_installed(context, stack) else None
    if early is not None:
        proxy.write_first_files(context, stack, early)
    unit_files.add(context, stack, render.without_install(*new.units.files))
    unit_files.assert_loaded(context, new.units)
    folder = context.paths.unit_folder(stack)
    context.progress.step("unit", str(folder / new.units.files[0].name))
    _make_way(context, steps, new, before, timeouts.drain_s)
    steps.begin("start")
    if early is not None:
        proxy.start_beside_engine(context, stack)
    started, deadline_s = startup.start(context, new), new.plan.timing.deadline_s
    # Behind a door clients need only the engine's answer; systemd may report it active later.
    seconds = startup.wait_until_ready(
        context, new, started, deadline_s=deadline_s, active=new.door is None
    )
    context.progress.step("ready", format_duration(seconds))
    steps.begin("answer")
    readiness_checks.require_engine_answer(context, new)
    if new.door is not None:
        steps.begin("open")
        proxy.route_to(context, stack, new.door)
        proxy.require_proxy_answer(context, new)
        proxy.report_queued(context, stack)
        # Progress may have extended the deadline, so the time starts anew at the first answer.
        again_s = seconds + deadline_s
        startup.wait_until_ready(
            context, new, started, deadline_s=again_s, active=True, answered=True
        )
    readiness_checks.check_stop_and_streaming(context, new)
    _leave_old(context, steps, new, before, timeouts)
    report = startup.engine_facts_after_start(context, new, started.since)
    # From here on both units would start at boot; the journal records which of them stays.
    steps.begin("enable")
    doors = (proxy.unit_file(context, stack, new.door),) if new.door else ()
    unit_files.add(context, stack, (*new.units.files, *doors))
    steps.begin("commit", committed=True)
    return seconds, report


def _make_way(
    context: Context, steps: _Steps, new: Generation, before: InstalledStack, drain_s: float
) -> None:
    """Stop the old engine unless both run side by side; its requests end first, new ones wait."""
    stack, old = new.stack, before.generation
    if not new.side_by_side and not before.is_stopped and before.unit is not None:
        if old is not None and old.door is not None and proxy.is_running(context, stack):
            steps.begin("hold")
            proxy.hold(context, stack)
            steps.begin("drain")
            proxy.drain(context, old, drain_s)
        steps.begin("stop")
        context.progress.progress("stop", before.unit)
        context.systemd.stop(render.service_name(before.unit))
    if old is not None and old.door is not None and new.door is None:
        # The new engine listens on the port that the door has.
        steps.begin("close")
        proxy.remove_proxy(context, stack)


def _leave_old(
    context: Context,
    steps: _Steps,
    new: Generation,
    before: InstalledStack,
    timeouts: RolloutTimeouts,
) -> None:
    """Wait until the old engine's requests have ended, and watch the new one for a while."""
    if new.side_by_side and before.generation is not None:
        steps.begin("drain")
        proxy.wait_idle(context, before.generation, timeouts.drain_s)
    if not before.is_stopped:
        steps.begin("soak")
        readiness_checks.soak(context, new, timeouts.soak_s)


def _finish(
    context: Context,
    new: Generation,
    before: InstalledStack,
    ready: tuple[float, tuple[EngineFact, ...]],
) -> Generation:
    """Complete a committed change; failures are warnings, and ``recover`` completes it later."""
    try:
        if problem := reconcile(context, new.stack, new, running=True):
            context.progress.warn(
                f"it served, but {problem.message}", f"stackctl status {new.stack}"
            )
        done = _ready(context, new, ready)
        if before.generation is not None:
            context.generations.set_outcome(before.generation, "replaced")
        context.journal.clear()
    except StackctlError as problem:
        context.progress.warn(f"it serves, but {problem.message}", "stackctl recover")
        # Only this process has the start time and the facts that the engine reported.
        with contextlib.suppress(StackctlError):
            return _ready(context, new, ready)
        return new
    return done


def _ready(
    context: Context, new: Generation, ready: tuple[float, tuple[EngineFact, ...]]
) -> Generation:
    seconds, report = ready
    return context.generations.set_outcome(new, "ready", ready_s=round(seconds, 2), report=report)


def _undo(context: Context, new: Generation, before: InstalledStack, error: BaseException) -> None:
    """Restore the previous state; further failures are warnings and do not hide the error."""
    stack, old = new.stack, before.generation
    context.progress.progress("restore", "stopping")
    if old is not None and before.file is not None and before.file not in old.units.files:
        context.progress.warn(f"{before.file.name} was changed by hand: it is put back as stored")
    try:
        stayed = old if old is not None and before.is_active and is_serving(context, old) else None
        idle = reconcile(context, stack, old, running=before.meant_to_run)
        _settle_undone(context, new, error)
        context.journal.clear()
        if idle is not None:
            text = f"put back as it was, but {idle.message}"
            context.progress.warn(text, f"stackctl status {stack}")
        elif stayed is not None:
            context.progress.step("restored", f"generation {stayed.number}, which never stopped")
    except StackctlError as problem:
        context.progress.warn(
            f"could not put everything back: {problem.message}", "stackctl recover"
        )
        _settle_undone(context, new, error)


def _settle_undone(context: Context, new: Generation, error: BaseException) -> None:
    message = error.message if isinstance(error, StackctlError) else type(error).__name__
    state: Literal["failed", "interrupted"] = "failed"
    if not isinstance(error, Exception):
        state = "interrupted"
    store_failure(context, new, state, message)
    deployment_records.write_audit_entry(
        context, new.operation, new.stack, generation=new.number, result=state, message=message
    )


def store_failure(
    context: Context, generation: Generation, state: GenerationState, message: str
) -> None:
    """Store the outcome of a generation that never served."""
    try:
        if generation.number in context.generations.numbers(generation.stack):
            context.generations.set_outcome(generation, state, message=message)
    except StackctlError as problem:
        context.progress.warn(f"the outcome was not stored: {problem.message}")


def reconcile(
    context: Context, stack: str, winner: Generation | None, *, running: bool
) -> StartFailed | None:
    """Make the stack run exactly this generation (None: no generation), whatever its state is.

    Returns:
        The error of an engine or a door that is installed but does not come up, else None. Another
        call would not help; systemd goes on with its restarts.

    Raises:
        StackctlError: a step failed; another call continues from there.
    """
    for unit in render.engine_unit_names(stack):
        if winner is None or render.service_name(unit) != winner.units.service:
            _stop_unit(context, unit)
    if winner is None:
        proxy.remove_proxy(context, stack)
        unit_files.remove_units(context, stack)
        for unit in render.engine_unit_names(stack):
            context.systemd.reset_failed(render.service_name(unit))
        return None
    unit_files.install_exactly(context, winner.units)
    unit_files.assert_loaded(context, winner.units)
    problem = None
    if running and not is_serving(context, winner):
        # A start that is under way goes on: a large model takes long, and a recovery may itself be
        # interrupted. A unit in any other state may be half stopped, so it is stopped first.
        if not _starts(context, winner):
            _stop_unit(context, winner.units.service.removesuffix(".service"))
        if winner.door is None:
            proxy.remove_proxy(context, stack)
        try:
            seconds = startup.start_and_wait(
                context, winner, deadline_s=winner.plan.timing.ceiling_s
            )
            context.progress.step(
                "restored",
                f"generation {winner.number}, answering after {format_duration(seconds)}",
            )
        except StartFailed as error:
            problem = error
    # Even if the engine is not up: a held door would keep clients from it once it is.
    try:
        proxy.reconcile_proxy(context, stack, winner.door)
    except StartFailed as error:
        problem = problem or error
    return problem


def is_serving(context: Context, generation: Generation) -> bool:
    """Return True if a generation is active and its engine answers in ``_ANSWER_S`` seconds."""
    state = context.systemd.show(generation.units.service, "ActiveState")["ActiveState"]
    path, port = find_engine(generation.plan.engine).health_path, generation.plan.engine_listen_port
    return state == "active" and endpoint.liveness(port, path, timeout_s=_ANSWER_S) == "ready"


def _starts(context: Context, generation: Generation) -> bool:
    """Return True if systemd is starting the unit, and does not wait before the next attempt."""
    seen = context.systemd.show(generation.units.service, "ActiveState", "SubState")
    return seen.get("ActiveState") == "activating" and seen.get("SubState", "").startswith("start")


def _stop_unit(context: Context, unit: str) -> None:
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
