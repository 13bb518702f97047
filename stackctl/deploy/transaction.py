"""A change of a stack: it happens completely, or the machine is restored.

Every step is in the journal before it begins, and ``reconcile`` makes the machine run one given
generation, whatever its state is. So reverting a change, finishing it and recovering from a crash
are the same: decide which generation wins, and converge to it. ``recover`` does so for a change
that a crash, a power loss or a kill has interrupted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from stackctl.deploy import proxy, startup, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import InstalledStack
from stackctl.deploy.startup import is_serving
from stackctl.errors import ExitCode, StackctlError, StartFailed
from stackctl.machine import lock
from stackctl.machine.signals import ignore_signals
from stackctl.quantity import format_duration
from stackctl.state.generations import utc_now
from stackctl.units import render
from stackctl.values.generation import EngineFact, Generation, GenerationState, Transaction


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
    record = Transaction(
        operation=new.operation,
        stack=new.stack,
        before=before.generation.number if before.generation else None,
        running=before.meant_to_run,
        after=new.number,
        step="store",
        started=utc_now(),
    )
    context.journal.write(record)
    try:
        context.generations.write(new)
        seconds, report = _Exchange(context, new, before, timeouts, record).run()
    except BaseException as error:
        with ignore_signals():
            _undo(context, new, before, error)
        raise
    with ignore_signals():
        done = _finish(context, new, before, seconds, report)
        context.write_audit_entry(new.operation, new.stack, generation=new.number)
        return done


@dataclass
class _Exchange:
    """One change up to its commit; each step is in the journal before it begins."""

    context: Context
    new: Generation
    before: InstalledStack
    timeouts: RolloutTimeouts
    record: Transaction

    def _begin(self, step: str, *, committed: bool = False) -> None:
        """Write the name of the next step; with ``committed`` the change is no longer reverted."""
        self.record = self.context.journal.step(self.record, step, committed=committed)

    def run(self) -> tuple[float, tuple[EngineFact, ...]]:
        """Make the new generation serve, up to the commit of the change.

        Returns:
            The seconds until it was ready, and the facts that its engine reports.
        """
        context, new, before, stack = self.context, self.new, self.before, self.new.stack
        self._begin("install")
        early = new.door if before.is_stopped and not proxy.is_installed(context, stack) else None
        if early is not None:
            proxy.write_first_files(context, stack, early)
        unit_files.add(context, stack, render.without_install(*new.units.files))
        unit_files.assert_loaded(context, new.units)
        folder = context.paths.unit_folder(stack)
        context.progress.step("unit", str(folder / new.units.files[0].name))
        self._make_way()
        self._begin("start")
        if early is not None:
            proxy.start(context, stack)
        started, deadline_s = startup.start(context, new), new.plan.timing.deadline_s
        # Behind a door clients need only the engine's answer; systemd may report it active later.
        seconds = startup.wait_until_ready(
            context, new, started, deadline_s=deadline_s, active=new.door is None
        )
        context.progress.step("ready", format_duration(seconds))
        self._begin("answer")
        startup.require_engine_answer(context, new)
        if new.door is not None:
            self._begin("open")
            proxy.route_to(context, stack, new.door)
            proxy.require_proxy_answer(context, new)
            proxy.report_queued(context, stack)
            # Progress may have extended the deadline, so the time starts anew at the first answer.
            again_s = seconds + deadline_s
            startup.wait_until_ready(
                context, new, started, deadline_s=again_s, active=True, answered=True
            )
        startup.check_stop_and_streaming(context, new)
        self._leave_old()
        report = startup.engine_facts_after_start(context, new, started.since)
        # From here on both units would start at boot; the journal records which of them stays.
        self._begin("enable")
        doors = (proxy.unit_file(context, stack, new.door),) if new.door else ()
        unit_files.add(context, stack, (*new.units.files, *doors))
        self._begin("commit", committed=True)
        return seconds, report

    def _make_way(self) -> None:
        """Stop the old engine unless both run side by side; its requests end, new ones wait."""
        context, new, before, stack = self.context, self.new, self.before, self.new.stack
        old = before.generation
        if not new.side_by_side and not before.is_stopped and before.unit is not None:
            if old is not None and old.door is not None and proxy.is_running(context, stack):
                self._begin("hold")
                proxy.hold(context, stack)
                self._begin("drain")
                proxy.drain(context, old, self.timeouts.drain_s)
            self._begin("stop")
            context.progress.progress("stop", before.unit)
            context.systemd.stop(render.service_name(before.unit))
        if old is not None and old.door is not None and new.door is None:
            # The new engine listens on the port that the door has.
            self._begin("close")
            proxy.remove_proxy(context, stack)

    def _leave_old(self) -> None:
        """Wait until the old engine's requests have ended, and watch the new one for a while."""
        if self.new.side_by_side and self.before.generation is not None:
            self._begin("drain")
            proxy.wait_idle(self.context, self.before.generation, self.timeouts.drain_s)
        if not self.before.is_stopped:
            self._begin("soak")
            startup.soak(self.context, self.new, self.timeouts.soak_s)


def _finish(
    context: Context,
    new: Generation,
    before: InstalledStack,
    seconds: float,
    report: tuple[EngineFact, ...],
) -> Generation:
    """Complete a committed change; failures are warnings, and ``recover`` completes it later."""

    def store_ready() -> Generation:
        return context.generations.set_outcome(
            new, "ready", ready_s=round(seconds, 2), report=report
        )

    try:
        if problem := reconcile(context, new.stack, new, running=True):
            context.progress.warn(
                f"it served, but {problem.message}", f"stackctl status {new.stack}"
            )
        done = store_ready()
        if before.generation is not None:
            context.generations.set_outcome(before.generation, "replaced")
        context.journal.clear()
    except StackctlError as problem:
        context.progress.warn(f"it serves, but {problem.message}", "stackctl recover")
        # Only this process has the start time and the facts that the engine reported.
        with contextlib.suppress(StackctlError):
            return store_ready()
        return new
    return done


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
    state: Literal["failed", "interrupted"]
    state = "failed" if isinstance(error, Exception) else "interrupted"
    _store_failure(context, new, state, message)
    context.write_audit_entry(
        new.operation, new.stack, generation=new.number, result=state, message=message
    )


def _store_failure(
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
            startup.stop_unit(context, unit)
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
        if not startup.is_starting(context, winner):
            startup.stop_unit(context, winner.units.service.removesuffix(".service"))
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


def recover(context: Context) -> Transaction | None:
    """Take the lock, and complete or revert the change in the journal.

    Returns:
        That change; None if there was none.

    Raises:
        StartFailed: the change has ended, but its generation does not come up.
        StackctlError: exit 7 while another stackctl is at work: the change is then still running.
    """
    # A killed process leaves its lock file behind: taking the lock removes it.
    if not context.journal.is_open and not context.paths.lock.exists():
        return None
    with lock.exclusive(context.paths.lock, "recover"):
        return _recover_locked(context)


def recover_quietly(context: Context, *, must: bool) -> None:
    """Recover at the start of a command, unless another stackctl is at work.

    Without ``must`` a failure is only a warning: commands that show the state must still work. An
    engine that does not come up is always a warning.
    """
    try:
        recover(context)
    except StackctlError as error:
        if error.exit_code == ExitCode.LOCKED:
            return
        if must and not isinstance(error, StartFailed):
            raise
        context.progress.warn(error.message, error.hint)


def recover_first(context: Context) -> None:
    """Recover before a change, with the lock held; an engine that does not start is a warning."""
    try:
        _recover_locked(context)
    except StartFailed as error:
        context.progress.warn(error.message, error.hint)


def _recover_locked(context: Context) -> Transaction | None:
    """Recover as ``recover`` does, with the lock held."""
    change = context.journal.read()
    if change is None:
        return None
    verb = "ending" if change.committed else "undoing"
    context.progress.warn(
        f"{change.operation} of {change.stack} was cut off at the step '{change.step}': "
        f"{verb} it ({_goal(change)})"
    )
    # If this is interrupted, the journal stays for the next command.
    try:
        winner = None
        if change.winner is not None:
            winner = context.generations.read(change.stack, change.winner)
        running = change.committed or change.running
        problem = reconcile(context, change.stack, winner, running=running)
        record_end(context, change)
        context.journal.clear()
    except StackctlError as error:
        error.message = f"cannot recover {change.stack}: {error.message}"
        again = f"stackctl recover tries again; stackctl down {change.stack} gives it up"
        error.hint = f"{error.hint}\n{again}" if error.hint else again
        raise
    context.write_audit_entry(
        change.operation,
        change.stack,
        generation=change.winner,
        result="recovered",
        message=_cut_off(change),
    )
    if problem is not None:
        problem.message = f"{_goal(change)} of {change.stack} is installed again, but {problem}"
        raise problem
    return change


def record_end(context: Context, change: Transaction) -> None:
    """Store the outcomes of the generations of an interrupted change."""
    store, stack = context.generations, change.stack
    known = store.numbers(stack)
    if not change.committed:
        if change.after in known:
            _store_failure(
                context, store.read(stack, change.after), "interrupted", _cut_off(change)
            )
        return
    if change.after in known:
        winner = store.read(stack, change.after)
        if winner.outcome.state == "starting":
            store.set_outcome(winner, "ready")
    if change.before != change.after and change.before in known:
        ended = store.read(stack, change.before)
        store.set_outcome(ended, "replaced" if change.after is not None else "stopped")


def _goal(change: Transaction) -> str:
    return f"generation {change.winner}" if change.winner is not None else "nothing runs"


def _cut_off(change: Transaction) -> str:
    return f"stackctl was ended at the step '{change.step}'"
