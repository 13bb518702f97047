"""The transactions ``up``, ``restart`` and ``down``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from stackctl.deploy import (
    change,
    door,
    engine_port,
    gpu,
    install,
    plan_inputs,
    preflight,
    proof,
    record,
    stack_state,
    takeover,
)
from stackctl.deploy.change import Patience
from stackctl.deploy.context import Context
from stackctl.deploy.new_generation import Wish, accept, draft
from stackctl.deploy.recover import record_end, recover_first
from stackctl.deploy.retry import agreed, with_other_kernels
from stackctl.deploy.stack_state import Before, installed_generation, not_running
from stackctl.deploy.start import start_and_wait
from stackctl.deploy.stored import require_unchanged
from stackctl.errors import ExitCode, StackctlError, StartFailed
from stackctl.machine import lock
from stackctl.machine.signals import ignore_signals
from stackctl.quantity import format_duration
from stackctl.state.generations import utc_now
from stackctl.units import render
from stackctl.units.proxy_unit import proxy_service
from stackctl.values.engine_facts import EngineWorkaround
from stackctl.values.generation import Generation
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile
from stackctl.values.transaction import Transaction
from stackctl.values.unit import UnitSet


@dataclass(frozen=True)
class UpResult:
    """The result of ``up``; ``generation`` is None if nothing was deployed (dry run)."""

    change: Literal["started", "unchanged", "none"]
    plan: Plan
    units: UnitSet
    generation: Generation | None


def up(context: Context, profile: Profile, wish: Wish) -> UpResult:
    """Plan, validate, install, start and check one stack, which replaces its present generation.

    A start that fails for a reason with a known remedy is attempted once more, with that remedy.

    Raises:
        StackctlError: with its exit code; the machine is then as it was before.
    """
    with writer(context, f"up {profile.stack}", wish.dry_run):

        def attempt(context: Context, profile: Profile, wish: Wish) -> UpResult:
            return with_other_kernels(
                context,
                profile.stack,
                lambda context, lesson: _up(context, profile, wish, lesson),
            )

        try:
            return attempt(context, profile, wish)
        except StartFailed as error:
            if wish.fit is None or not error.sets:
                raise
            words = " ".join(f"--set {text}" for text in error.sets)
            context.report.warn(f"{error.message}: once more with {words} (--auto-fit)")
            fitting, asked = wish.fit(error.sets)
        return attempt(agreed(context), fitting, dataclasses.replace(wish, asked=asked))


def _up(
    context: Context, profile: Profile, wish: Wish, lesson: EngineWorkaround | None
) -> UpResult:
    """Make one attempt, with the options learned from the previous one; the lock is held."""
    context.systemd.require()
    basis = plan_inputs.read_basis(context.paths, context.machine)
    generator, store = preflight.require_tools(basis.host), context.generations
    new_draft = draft(context, basis, profile, wish, lesson)
    before = _without_orphan(context, profile.stack, wish)
    # First with the slot and port of the running generation, to detect that nothing changes.
    number = max((0, *store.numbers(profile.stack))) + 1
    old, free = before.generation, None
    if new_draft.door_image is not None:
        free = engine_port.private_port(context.machine, store, profile, basis.claims)
    port = old.plan.engine_port if old is not None and free is not None else None
    new = new_draft.generation(before.unit or profile.stack, port or free, number)
    accept(context, new_draft, new.plan)
    if current := unchanged(context, new, before, wish):
        return UpResult("unchanged", new.plan, current.units, current)
    if old is not None:
        unit = takeover.other_slot(profile.stack, before.unit)
        new = new_draft.generation(unit, free, number)
    done = replace(context, new, before, basis.host, wish, generator)
    return UpResult("started" if done else "none", new.plan, new.units, done)


def _without_orphan(context: Context, stack: str, wish: Wish) -> Before:
    """Return the state of the stack, after stopping an engine that runs without its unit file."""
    before = stack_state.look(context, stack)
    if before.file is None and before.unit is not None and not wish.dry_run:
        context.report.warn(f"{before.unit} runs without its unit file: it is stopped")
        change.converge(context, stack, None, running=False)
        before = stack_state.look(context, stack)
    return before


def unchanged(context: Context, new: Generation, before: Before, wish: Wish) -> Generation | None:
    """Return the generation that serves if the new one equals it, else None; apply its door."""
    current = before.generation
    if current is None or not takeover.same(new, before) or not change.serves(context, current):
        return None
    if not wish.dry_run:
        door.apply(context, current.stack, current.door)
    return current


def replace(
    context: Context, new: Generation, before: Before, host: Host, wish: Wish, generator: str
) -> Generation | None:
    """Run all checks, report the changes, ask the user, and deploy the new generation.

    Returns:
        The generation, ready; None for a dry run.
    """
    install.refuse_foreign(context, new.stack, new.units.service)
    if new.door is not None:
        install.refuse_foreign(context, new.stack, proxy_service(new.stack))
    strategy = takeover.choose(context, new, before, host)
    new = msgspec.structs.replace(new, strategy=strategy)
    takeover.require_room(context, host, new, before, force=wish.force)
    doors = (door.unit_file(context, new.stack, new.door),) if new.door else ()
    install.validate(context, new.stack, (*new.units.files, *doors), generator)
    gpu.prove(new.image_id, gpu.planned(host, new.plan))
    if wish.dry_run:
        return None
    if before.active and before.generation is not None:
        takeover.tell(context, before.generation, new)
        if not context.confirm(
            f"{new.stack} is running (generation {before.generation.number}) and would be replaced"
        ):
            raise StackctlError("nothing was changed", exit_code=ExitCode.FAILED)
    return change.carry_out(context, new, before, wish.patience)


def down(context: Context, stack: str) -> None:
    """Stop a stack and remove its units. Raise StackctlError (exit 3) if it is not up."""
    with lock.exclusive(context.paths.lock, f"down {stack}"):
        files = install.installed(context, stack)
        cut_off = context.journal.read()
        # An interrupted change of this stack is not recovered first, because that may be
        # impossible, and its result is removed anyway.
        if cut_off is None or cut_off.stack != stack or not files:
            recover_first(context)
            cut_off = None
            files = install.installed(context, stack)
        if not files and stack_state.look(context, stack).stopped:
            raise not_running(stack)
        file = install.engine_file(stack, files)
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
                context.report.warn(f"if interrupted, repeat the command: {problem.message}")
            change.converge(context, stack, None, running=False)
            try:
                if cut_off is not None:
                    record_end(context, cut_off)
                if number is not None:
                    generation = context.generations.read(stack, number)
                    context.generations.set_outcome(generation, "stopped")
            except StackctlError as problem:
                # The stack is down, so the command has succeeded.
                context.report.warn(f"not recorded: {problem.message}")
            context.journal.clear()
            record.done(context, "down", stack, generation=number)


def restart(context: Context, stack: str, patience: Patience) -> Generation:
    """Restart the installed generation of a stack, and wait until it answers.

    With a front door, running requests end first and new ones wait.

    Raises:
        StackctlError: exit 3 if the stack is not up; exit 6, before anything is stopped, if it
            would not get its GPU again; 1 if it does not come up again.
    """
    with writer(context, f"restart {stack}"):
        generation = installed_generation(context, stack)
        gpu.prove(generation.image_id, gpu.planned(generation.host, generation.plan))
        require_unchanged(context, generation.plan.model)
        active = stack_state.look(context, stack).active
        held = generation.door is not None and active and door.is_open(context, stack)
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
                door.hold(context, stack)
                door.drain(context, generation, patience.drain_s)
            seconds = start_and_wait(
                context, generation, deadline_s=generation.plan.timing.deadline_s, restart=True
            )
            context.report.step("ready", format_duration(seconds))
            proof.require_answer(context, generation)
        except BaseException:
            if problem := _reopen(context, generation):
                context.report.warn(problem.message, problem.hint)
            raise
        if problem := _reopen(context, generation):
            raise problem
        record.done(context, "restart", stack, generation=generation.number)
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
                    door.apply(context, generation.stack, generation.door)
            except StartFailed as error:
                problem = error
            context.journal.clear()
        except StackctlError as error:
            error.hint = error.hint or "then: stackctl recover"
            problem = error
    return problem


@contextlib.contextmanager
def writer(context: Context, purpose: str, dry_run: bool = False) -> Iterator[None]:
    """Hold the lock of the scope after recovering earlier changes; a dry run needs neither."""
    if dry_run:
        yield
        return
    with lock.exclusive(context.paths.lock, purpose):
        recover_first(context)
        install.sweep(context.paths.runtime)
        yield
