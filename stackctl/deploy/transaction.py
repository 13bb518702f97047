"""Deployments as transactions: all of it happens, or the machine is as it was."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stackctl.deploy import images, install, preflight
from stackctl.deploy.context import Context
from stackctl.deploy.start import start_and_wait
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import lock, podman, runner
from stackctl.plan import ledger
from stackctl.plan.ledger import claim_of
from stackctl.plan.placement import sharing
from stackctl.plan.solve import Known, solve
from stackctl.plan.verdict import besides, headline
from stackctl.probe import probe
from stackctl.quantity import format_bytes, format_duration
from stackctl.sources.models import read_model
from stackctl.state import calibrations, claims
from stackctl.state.generations import now
from stackctl.units import render
from stackctl.values.generation import Generation, Outcome, State
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile
from stackctl.values.result import Result
from stackctl.values.unit import UnitFile, UnitSet


@dataclass(frozen=True)
class Wish:
    """What ``up`` was asked for besides the profile."""

    deadline_s: float | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class UpResult:
    """What ``up`` did. Without ``generation`` nothing was (dry run)."""

    change: Literal["started", "unchanged", "none"]
    plan: Plan
    units: UnitSet
    generation: Generation | None


@dataclass(frozen=True)
class _Before:
    """The stack as it was: its files, its generation, and what systemd said of it."""

    files: tuple[UnitFile, ...]
    number: int | None
    state: str

    @property
    def running(self) -> bool:
        """Whether it was up."""
        return self.state == "active"

    @property
    def stopped(self) -> bool:
        """Whether nothing of it was there that a start could collide with."""
        return self.state in ("inactive", "failed")


def up(
    context: Context,
    profile: Profile,
    wish: Wish,
    advise: Callable[[Plan], Plan] = lambda plan: plan,
) -> UpResult:
    """Plan, validate, install, start and check one stack.

    ``advise`` adds to a plan that is refused what would help instead.

    Raises:
        StackctlError: with its exit code; the machine is then as it was before.
    """
    with _writer(context, f"up {profile.stack}", wish.dry_run):
        context.systemd.require()
        host = probe(context.machine, scope=context.paths.scope)
        generator = preflight.require_tools(host)
        model = read_model(preflight.require_model(profile))
        known = Known(
            image="",
            image_reason="",
            claims=claims.declared(context.machine, context.paths),
            calibrations=calibrations.read(context.paths.state),
            deadline_s=wish.deadline_s,
        )
        # What is no use is refused before it asks for gigabytes of model and image.
        early = solve(host=host, model=model, profile=profile, known=known)
        if _is_refused(early) and not wish.force:
            raise refused(advise(early))
        preflight.require_files(model)
        context.report.step("model", f"{format_bytes(model.weights_bytes)}, {model.source}")
        engine = find_engine(profile.engine)
        with podman.connect(context.paths.runtime) as api:
            image, reference, reason = images.ensure_image(context, api, profile, engine)
        facts = images.inspect_engine(context, engine, image, reference)
        plan = solve(
            host=host,
            model=model,
            profile=profile,
            known=replace(known, image=image.reference, image_reason=reason, facts=facts),
        )
        if _is_refused(plan) and not wish.force:
            raise refused(advise(plan))
        context.report.step("plan", summary(plan))
        if plan.placement.shared_with:
            context.report.warn(f"cores {sharing(plan.placement.shared_with)}")
        before = _before(context, plan.stack)
        target = render.Target(
            scope=context.paths.scope,
            podman=host.tools.podman,
            image=image.reference,
            program=facts.program,
            claim=claim_of(plan),
        )
        number = max((0, *context.generations.numbers(plan.stack))) + 1
        units = render.render(plan, target, number)
        if _same(units.files, before.files) and (current := _current(context, plan, before)):
            return UpResult("unchanged", plan, current.units, current)
        install.refuse_foreign(context, units)
        _require_room(context, host, plan, before, wish)
        install.validate(context, units, generator)
        if wish.dry_run:
            return UpResult("none", plan, units, None)
        if before.running and not context.confirm(
            f"{plan.stack} is running (generation {before.number}) and would be replaced"
        ):
            raise StackctlError("nothing was changed", exit_code=ExitCode.FAILED)
        generation = Generation(
            number=number,
            stack=plan.stack,
            created=now(),
            image=reference,
            image_id=image.id,
            units=units,
            plan=plan,
            host=host,
            outcome=Outcome(state="starting", changed=now()),
        )
        context.generations.write(generation)
        return UpResult("started", plan, units, _deploy(context, generation, before))


def down(context: Context, stack: str) -> None:
    """Stop a stack and remove its units. Raises StackctlError (exit 3) when it is not there."""
    with _writer(context, f"down {stack}"):
        files = install.installed(context, stack)
        if not files:
            raise not_running(stack)
        with _uninterrupted():
            number = render.generation_of(files[0].text)
            _take_down(context, stack)
            try:
                if number is not None:
                    generation = context.generations.read(stack, number)
                    context.generations.finish(generation, "stopped")
            except StackctlError as problem:
                # It is down, which is what was asked for.
                context.report.warn(f"not recorded: {problem.message}")


def restart(context: Context, stack: str) -> Generation:
    """Restart a stack as it is installed, and wait until it answers."""
    with _writer(context, f"restart {stack}"):
        generation = installed_generation(context, stack)
        context.report.progress("stop", generation.units.service)
        context.systemd.stop(generation.units.service)
        return _start_and_check(context, generation)


def installed_generation(context: Context, stack: str) -> Generation:
    """The stored generation whose units are installed. Raises StackctlError (exit 3) if none is."""
    files = install.installed(context, stack)
    if not files:
        raise not_running(stack)
    number = render.generation_of(files[0].text)
    if number is None:
        raise StackctlError(
            f"the unit of {stack} was changed by hand: it names no generation",
            hint=f"stackctl down {stack}, then up again",
        )
    return context.generations.read(stack, number)


def not_running(stack: str) -> StackctlError:
    """The error for a stack that is not up."""
    return StackctlError(
        f"{stack} is not up", hint="stackctl up PROFILE", exit_code=ExitCode.NOT_RUNNING
    )


def refused(plan: Plan) -> StackctlError:
    """The error for a plan that does not fit or is not worth running: why, and what would be."""
    return StackctlError(
        headline(plan),
        details=besides(plan),
        hint="\n".join(
            ("what helps, best first", *plan.verdict.alternatives, "--force: start it anyway")
        ),
        exit_code=ExitCode.REFUSED,
    )


def _is_refused(plan: Plan) -> bool:
    return plan.verdict.fits is False or plan.verdict.viable is False


def summary(plan: Plan) -> str:
    """A plan in one line."""
    memory = plan.memory
    fits = {True: "fits", False: "does not fit", None: "memory unknown"}[plan.verdict.fits]
    limit = "" if memory.limit_bytes is None else f" of {format_bytes(memory.limit_bytes)}"
    return f"{plan.profile} · {plan.objective} · {fits} ({format_bytes(memory.total_bytes)}{limit})"


def _deploy(context: Context, generation: Generation, before: _Before) -> Generation:
    stack = generation.stack
    try:
        if not before.stopped:
            context.report.progress("stop", f"generation {before.number}")
            context.systemd.stop(generation.units.service)
        install.install(context, stack, generation.units.files)
        install.assert_loaded(context, generation.units)
        folder = context.paths.unit_folder(stack)
        context.report.step("unit", str(folder / generation.units.files[0].name))
        ready = _start_and_check(context, generation)
    except BaseException as error:
        with _uninterrupted():
            _undo(context, generation, before, error)
        raise
    if before.number is not None and before.number in context.generations.numbers(stack):
        context.generations.finish(context.generations.read(stack, before.number), "replaced")
    return ready


def _start_and_check(context: Context, generation: Generation) -> Generation:
    plan = generation.plan
    seconds = start_and_wait(context, generation, deadline_s=plan.timing.deadline_s)
    context.report.step("ready", format_duration(seconds))
    context.report.progress("answer", "asking for a completion")
    results = endpoint.check(
        plan.port,
        find_engine(plan.engine).health_path,
        plan.served_name,
        answer_timeout_s=plan.timing.deadline_s,
    )
    failed = next((result for result in results if result.status == "fail"), None)
    if failed is not None:
        raise StackctlError(
            f"{plan.stack} started, but {failed.name} is wrong: {failed.actual}",
            details=_evidence(failed),
            hint=f"log: stackctl logs {plan.stack} --generation {generation.number}",
        )
    context.report.step("answer", f"ok     {results[-1].actual}")
    return context.generations.finish(generation, "ready", ready_s=round(seconds, 2))


def _evidence(result: Result) -> Sequence[str]:
    lines = (f"expected {result.expected}" if result.expected else None, result.evidence)
    return [line for line in lines if line]


def _undo(context: Context, generation: Generation, before: _Before, error: BaseException) -> None:
    """Put the machine back as it was; what fails meanwhile is told, and does not hide the error."""
    stack = generation.stack
    interrupted = not isinstance(error, Exception)
    context.report.progress("restore", "stopping")
    try:
        context.systemd.abort(generation.units.service)
        if before.files:
            install.install(context, stack, before.files)
            context.systemd.reset_failed(generation.units.service)
            _resume(context, stack, before)
        else:
            _take_down(context, stack)
    except StackctlError as problem:
        context.report.warn(
            f"could not put everything back: {problem.message}", f"stackctl down {stack}"
        )
    try:
        message = error.message if isinstance(error, StackctlError) else type(error).__name__
        state: State = "interrupted" if interrupted else "failed"
        context.generations.finish(generation, state, message=message)
    except StackctlError as problem:
        context.report.warn(f"the outcome was not stored: {problem.message}")


def _resume(context: Context, stack: str, before: _Before) -> None:
    if not before.running or before.number is None:
        return
    previous = context.generations.read(stack, before.number)
    seconds = start_and_wait(context, previous, deadline_s=previous.plan.timing.ceiling_s)
    context.report.step(
        "restored", f"generation {before.number}, answering after {format_duration(seconds)}"
    )


def _take_down(context: Context, stack: str) -> None:
    service, container = render.service_name(stack), render.container_name(stack)
    context.systemd.stop(service)
    install.remove(context, stack)
    context.systemd.reset_failed(service)
    # systemd's stop removes the container; a stop that was cut short may have left it.
    if podman.containers(container):
        runner.run(("podman", "rm", "--force", "--time=5", container))


def _before(context: Context, stack: str) -> _Before:
    files = install.installed(context, stack)
    if not files:
        return _Before((), None, "inactive")
    state = context.systemd.show(render.service_name(stack), "ActiveState")["ActiveState"]
    return _Before(files, render.generation_of(files[0].text), state)


def _current(context: Context, plan: Plan, before: _Before) -> Generation | None:
    """The generation that runs, if it is known and answers."""
    path = find_engine(plan.engine).health_path
    if not before.running or before.number is None:
        return None
    if endpoint.liveness(plan.port, path) != "ready":
        return None
    current = context.generations.read(plan.stack, before.number)
    if current.outcome.state == "starting":
        # Whoever started it was killed before it could say so.
        return context.generations.finish(current, "ready")
    return current


def _same(new: tuple[UnitFile, ...], old: tuple[UnitFile, ...]) -> bool:
    def texts(files: tuple[UnitFile, ...]) -> list[tuple[str, str]]:
        return sorted((file.name, render.without_generation(file.text)) for file in files)

    return texts(new) == texts(old)


def _require_room(context: Context, host: Host, plan: Plan, before: _Before, wish: Wish) -> None:
    """Port and free memory as they are now; what the running generation holds counts as free."""
    old = None
    if not before.stopped and before.number in context.generations.numbers(plan.stack):
        old = context.generations.read(plan.stack, before.number or 0).plan
    if old is None or old.port != plan.port:
        preflight.require_port(context.machine, plan.port)
        others = ledger.others(claims.declared(context.machine, context.paths), plan.stack)
        if owner := ledger.port_owner(others, plan.port):
            raise StackctlError(
                f"port {plan.port} belongs to {owner}",
                hint=f"another port: --set port={plan.port + 1}, or stackctl down {owner}",
            )
    if not wish.force:
        preflight.require_free_memory(host, plan, old)


@contextlib.contextmanager
def _writer(context: Context, purpose: str, dry_run: bool = False) -> Iterator[None]:
    """The scope's lock; a dry run writes nothing and needs none."""
    if dry_run:
        yield
        return
    with lock.exclusive(context.paths.lock, purpose):
        yield


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and the like while the machine is put back: half of that is worse than none."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    saved = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
