"""The transactions ``up``, ``restart`` and ``down``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from stackctl.deploy import (
    gpu_access,
    planning,
    preflight,
    proxy,
    stack_state,
    transaction,
    unit_files,
)
from stackctl.deploy.context import Context
from stackctl.deploy.model_integrity import require_unchanged
from stackctl.deploy.new_generation import UpOptions, check_plan, draft_generation
from stackctl.deploy.stack_state import InstalledStack, installed_generation, not_running
from stackctl.deploy.startup import is_serving, require_engine_answer, start_and_wait
from stackctl.deploy.transaction import RolloutTimeouts, record_end, recover_first
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError, StartFailed
from stackctl.machine import lock
from stackctl.machine.signals import ignore_signals
from stackctl.quantity import format_duration
from stackctl.state import learned_facts
from stackctl.state.generations import utc_now
from stackctl.units import render
from stackctl.units.proxy_unit import proxy_service
from stackctl.values.engine_facts import EngineWorkaround
from stackctl.values.generation import Generation, Transaction, UnitSet
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile

T = TypeVar("T")


@dataclass(frozen=True)
class UpResult:
    """The result of ``up``; ``generation`` is None if nothing was deployed (dry run)."""

    change: Literal["started", "unchanged", "none"]
    plan: Plan
    units: UnitSet
    generation: Generation | None


def up(context: Context, profile: Profile, options: UpOptions) -> UpResult:
    """Plan, validate, install, start and check one stack, which replaces its present generation.

    A start that fails for a reason with a known remedy is attempted once more, with that remedy.

    Raises:
        StackctlError: with its exit code; the machine is then as it was before.
    """
    with exclusive_change(context, f"up {profile.stack}", options.dry_run):

        def attempt(context: Context, profile: Profile, options: UpOptions) -> UpResult:
            return retry_with_fallback_kernels(
                context,
                profile.stack,
                lambda context, lesson: _up(context, profile, options, lesson),
            )

        try:
            return attempt(context, profile, options)
        except StartFailed as error:
            if options.fit is None or not error.sets:
                raise
            words = " ".join(f"--set {text}" for text in error.sets)
            context.progress.warn(f"{error.message}: once more with {words} (--auto-fit)")
            fitting, asked = options.fit(error.sets)
        return attempt(
            _without_confirmation(context), fitting, dataclasses.replace(options, asked=asked)
        )


def retry_with_fallback_kernels(
    context: Context, stack: str, attempt: Callable[[Context, EngineWorkaround | None], T]
) -> T:
    """Attempt a start, and once more with other kernels if the engine's usual ones are at fault.

    If that helps, the options are stored for this image and GPU.

    Raises:
        StackctlError: the error of the last attempt; the machine is as it was before.
    """
    try:
        return attempt(context, None)
    except StartFailed as error:
        lesson = _lesson(context, stack, error) if error.kernel else None
        if lesson is None:
            raise
        options = " ".join(f"--{text.replace('=', ' ')}" for text in lesson.options)
        context.progress.warn(f"{error.message}: once more with {options}")
    done = attempt(_without_confirmation(context), lesson)
    learned_facts.add_workaround(context.paths.state, lesson)
    return done


def _without_confirmation(context: Context) -> Context:
    """Return the context for another attempt at a change, which the user has already confirmed."""
    return dataclasses.replace(context, confirm=lambda _: True)


def _lesson(context: Context, stack: str, error: StartFailed) -> EngineWorkaround | None:
    """Return the options for the next attempt; None if no options are known to help."""
    numbers = context.generations.numbers(stack)
    if not numbers:
        return None
    failed = context.generations.read(stack, max(numbers))
    cards = gpu_access.planned_gpus(failed.host, failed.plan)
    fallback = find_engine(failed.plan.engine).fallback_kernels(failed.plan.model, cards)
    decided = {decision.field for decision in failed.plan.decisions}
    facts = context.engine_facts.get(failed.image_id)
    known = {name for option in facts.options for name in option.names} if facts else set()
    options = [
        f"{name}={value}"
        for name, value in fallback
        if name not in decided and f"--{name}" in known
    ]
    if not options:
        return None
    return EngineWorkaround(
        image_id=failed.image_id,
        gpu=cards[0].name if cards else None,
        options=tuple(options),
        why=error.cause or error.message,
        seen=utc_now(),
    )


def _up(
    context: Context, profile: Profile, options: UpOptions, lesson: EngineWorkaround | None
) -> UpResult:
    """Make one attempt, with the options learned from the previous one; the lock is held."""
    context.systemd.require()
    basis = planning.read_basis(context.paths, context.machine)
    generator, store = preflight.require_tools(basis.host), context.generations
    new_draft = draft_generation(context, basis, profile, options, lesson)
    before = _without_orphan(context, profile.stack, options)
    # First with the slot and port of the running generation, to detect that nothing changes.
    number = max((0, *store.numbers(profile.stack))) + 1
    old, free = before.generation, None
    if new_draft.door_image is not None:
        free = preflight.allocate_engine_port(context.machine, store, profile, basis.claims)
    port = old.plan.engine_port if old is not None and free is not None else None
    new = new_draft.generation(before.unit or profile.stack, port or free, number)
    check_plan(context, new_draft, new.plan)
    if current := serving_if_unchanged(context, new, before, options):
        return UpResult("unchanged", new.plan, current.units, current)
    if old is not None:
        unit = preflight.free_slot(profile.stack, before.unit)
        new = new_draft.generation(unit, free, number)
    done = roll_out(context, new, before, basis.host, options, generator)
    return UpResult("started" if done else "none", new.plan, new.units, done)


def _without_orphan(context: Context, stack: str, options: UpOptions) -> InstalledStack:
    """Return the state of the stack, after stopping an engine that runs without its unit file."""
    before = stack_state.inspect_stack(context, stack)
    if before.file is None and before.unit is not None and not options.dry_run:
        context.progress.warn(f"{before.unit} runs without its unit file: it is stopped")
        transaction.reconcile(context, stack, None, running=False)
        before = stack_state.inspect_stack(context, stack)
    return before


def serving_if_unchanged(
    context: Context, new: Generation, before: InstalledStack, options: UpOptions
) -> Generation | None:
    """Return the generation that serves if the new one equals it, else None; apply its door."""
    current = before.generation
    if (
        current is None
        or not preflight.is_unchanged(new, before)
        or not is_serving(context, current)
    ):
        return None
    if not options.dry_run:
        proxy.reconcile_proxy(context, current.stack, current.door)
    return current


def roll_out(
    context: Context,
    new: Generation,
    before: InstalledStack,
    host: Host,
    options: UpOptions,
    generator: str,
) -> Generation | None:
    """Run all checks, report the changes, ask the user, and deploy the new generation.

    Returns:
        The generation, ready; None for a dry run.
    """
    unit_files.require_own_service(context, new.stack, new.units.service)
    if new.door is not None:
        unit_files.require_own_service(context, new.stack, proxy_service(new.stack))
    strategy = preflight.choose_strategy(context, new, before, host)
    new = msgspec.structs.replace(new, strategy=strategy)
    preflight.require_room(context, host, new, before, force=options.force)
    doors = (proxy.unit_file(context, new.stack, new.door),) if new.door else ()
    unit_files.validate(context, new.stack, (*new.units.files, *doors), generator)
    gpu_access.test_gpu_container(new.image_id, gpu_access.planned_gpus(host, new.plan), host)
    if options.dry_run:
        return None
    if before.is_active and before.generation is not None:
        preflight.show_changes(context, before.generation, new)
        if not context.confirm(
            f"{new.stack} is running (generation {before.generation.number}) and would be replaced"
        ):
            raise StackctlError("nothing was changed", exit_code=ExitCode.FAILED)
    return transaction.apply_generation(context, new, before, options.timeouts)


def down(context: Context, stack: str) -> None:
    """Stop a stack and remove its units. Raise StackctlError (exit 3) if it is not up."""
    with lock.exclusive(context.paths.lock, f"down {stack}"):
        files = unit_files.installed(context, stack)
        cut_off = context.journal.read()
        # An interrupted change of this stack is not recovered first, because that may be
        # impossible, and its result is removed anyway.
        if cut_off is None or cut_off.stack != stack or not files:
            recover_first(context)
            cut_off = None
            files = unit_files.installed(context, stack)
        if not files and stack_state.inspect_stack(context, stack).is_stopped:
            raise not_running(stack)
        file = unit_files.engine_file(stack, files)
        number = render.generation_of(file.text) if file else None
        if cut_off is not None:
            number = cut_off.winner
        with ignore_signals():
            step = Transaction(
                operation="down",
                stack=stack,
                before=number,
                committed=True,
                step="stop",
                started=utc_now(),
            )
            try:
                context.journal.write(step)
            except StackctlError as problem:
                # A full disk must not prevent the stop.
                context.progress.warn(f"if interrupted, repeat the command: {problem.message}")
            transaction.reconcile(context, stack, None, running=False)
            try:
                if cut_off is not None:
                    record_end(context, cut_off)
                if number is not None:
                    generation = context.generations.read(stack, number)
                    context.generations.set_outcome(generation, "stopped")
            except StackctlError as problem:
                # The stack is down, so the command has succeeded.
                context.progress.warn(f"not recorded: {problem.message}")
            context.journal.clear()
            context.write_audit_entry("down", stack, generation=number)


def restart(context: Context, stack: str, timeouts: RolloutTimeouts) -> Generation:
    """Restart the installed generation of a stack, and wait until it answers.

    With a front door, running requests end first and new ones wait.

    Raises:
        StackctlError: exit 3 if the stack is not up; exit 6, before anything is stopped, if it
            would not get its GPU again; 1 if it does not come up again.
    """
    with exclusive_change(context, f"restart {stack}"):
        generation = installed_generation(context, stack)
        gpu_access.test_gpu_container(
            generation.image_id,
            gpu_access.planned_gpus(generation.host, generation.plan),
            generation.host,
        )
        require_unchanged(context, generation.plan.model)
        active = stack_state.inspect_stack(context, stack).is_active
        held = generation.door is not None and active and proxy.is_running(context, stack)
        step = Transaction(
            operation="restart",
            stack=stack,
            before=generation.number,
            after=generation.number,
            running=True,
            committed=True,
            step="restart",
            started=utc_now(),
        )
        context.journal.write(step)
        try:
            if held:
                proxy.hold(context, stack)
                proxy.drain(context, generation, timeouts.drain_s)
            seconds = start_and_wait(
                context, generation, deadline_s=generation.plan.timing.deadline_s, restart=True
            )
            context.progress.step("ready", format_duration(seconds))
            require_engine_answer(context, generation)
        except BaseException:
            if problem := _reopen(context, generation):
                context.progress.warn(problem.message, problem.hint)
            raise
        if problem := _reopen(context, generation):
            raise problem
        context.write_audit_entry("restart", stack, generation=generation.number)
        return context.generations.set_outcome(
            generation,
            "ready",
            ready_s=round(seconds, 2),
            report=generation.outcome.report,
        )


def _reopen(context: Context, generation: Generation) -> StackctlError | None:
    """Open the front door after a restart, even if that failed; return the error if it stays shut.

    If the door does not start, systemd goes on with its restarts. After any other error the change
    stays in the journal.
    """
    problem: StackctlError | None = None
    with ignore_signals():
        try:
            try:
                if generation.door is not None:
                    proxy.reconcile_proxy(context, generation.stack, generation.door)
            except StartFailed as error:
                problem = error
            context.journal.clear()
        except StackctlError as error:
            error.hint = error.hint or "then: stackctl recover"
            problem = error
    return problem


@contextlib.contextmanager
def exclusive_change(context: Context, purpose: str, dry_run: bool = False) -> Iterator[None]:
    """Hold the lock of the scope after recovering earlier changes; a dry run needs neither."""
    if dry_run:
        yield
        return
    with lock.exclusive(context.paths.lock, purpose):
        recover_first(context)
        unit_files.remove_stale_staging(context.paths.runtime)
        yield
