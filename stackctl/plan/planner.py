"""Makes a plan from host, model, profile and engine facts. Nothing here reads the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.engines.options import Dialect, Option, int_option, workaround_options
from stackctl.engines.protocol import Engine, EngineRequest, Footprint
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan import (
    claimed_resources,
    engine_arguments,
    memory,
    placement,
    roofline,
    verdict,
)
from stackctl.plan.suggestions import largest_fitting, suggest_changes
from stackctl.quantity import format_bytes
from stackctl.values.engine_facts import Calibration, EngineFacts, EngineWorkaround, MeasuredMemory
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Claim, Decision, DecisionSource, MemoryBudget, Plan, Timing
from stackctl.values.profile import Profile

#: Bytes per second of the slowest storage that a start waits for: a hard disk.
_READ_BYTES_S = 100e6
#: Step in which "auto" searches a context, in tokens, and the most requests that it plans.
_AUTO_STEP = 256
_AUTO_REQUESTS = 256
#: Claims that a note names.
_SHOWN = 3


@dataclass(frozen=True)
class PlanInputs:
    """Inputs of a plan besides host, model and profile; all but the image may be missing.

    ``facts`` describes the image's engine (None: plan for the newest known dialect), ``claims`` are
    the claims of all stacks, ``calibrations`` the measurements of this machine, and ``deadline_s``
    the seconds allowed for the start (None: derived from the model's size).
    """

    image: str
    image_reason: str
    facts: EngineFacts | None = None
    claims: tuple[Claim, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    deadline_s: float | None = None
    #: Options that this image needed on these GPUs.
    workaround: EngineWorkaround | None = None
    #: Memory measured in this model's earlier starts with this image, newest first.
    measured_memory: tuple[MeasuredMemory, ...] = ()
    #: A private port for the engine behind a front door; None: the engine has the profile's port.
    engine_port: int | None = None
    #: Reason for the front door or for its absence; None if the front door is not planned.
    door_reason: str | None = None


def make_plan(*, host: Host, model: Model, profile: Profile, inputs: PlanInputs) -> Plan:
    """Plan one stack.

    ``auto`` for context or concurrency becomes the largest value that fits. A plan that does not
    fit or is not viable is returned; its verdict refuses it.

    Raises:
        StackctlError: exit 2 for an invalid option or placement, exit 6 if the host lacks a GPU
            or a controller, exit 5 for a model that this engine cannot run.
    """
    if (why := model.reason_unsupported(profile.engine)) is not None:
        raise StackctlError(
            f"{profile.engine} cannot run {model.name or model.source}",
            details=(why,),
            hint="another model: --model SOURCE, or a profile of another engine",
            exit_code=ExitCode.REFUSED,
        )
    claims = claimed_resources.other_claims(inputs.claims, profile.stack)
    planner = _Planner(host, model, replace(inputs, claims=claims))
    wanted, together = profile, profile.concurrency == "auto"
    for field, most, step in (
        ("concurrency", _AUTO_REQUESTS, 1),
        ("context", model.context or 131072, _AUTO_STEP),
    ):
        if getattr(profile, field) == "auto":
            wanted = planner.with_largest(wanted, field, most, step, together=together)
    plan, _ = planner.plan(wanted, asked=profile)
    if plan.verdict.fits is not False:
        return plan

    def attempt(changed: Profile, beside: Sequence[Claim]) -> Plan:
        return replace(planner, inputs=replace(inputs, claims=tuple(beside))).plan(changed)[0]

    changes = suggest_changes(host, model, wanted, plan, claims, attempt)
    judged = msgspec.structs.replace(plan.verdict, alternatives=changes)
    return msgspec.structs.replace(plan, verdict=judged)


def make_plan_ignoring_user_claims(
    *, host: Host, model: Model, profile: Profile, inputs: PlanInputs, binding: Sequence[Claim]
) -> tuple[Plan, PlanInputs]:
    """Make a plan as ``make_plan``; if it is refused only for claims that do not bind, ignore
    these. They are those of ordinary users, if root plans.

    Returns:
        The plan and its inputs. Without the ignored claims, the inputs hold the ``binding`` ones.

    Raises:
        StackctlError: as ``make_plan``.
    """
    plan = make_plan(host=host, model=model, profile=profile, inputs=inputs)
    rest = replace(inputs, claims=tuple(binding))
    if not verdict.is_refused(plan) or len(rest.claims) == len(inputs.claims):
        return plan, inputs
    without = make_plan(host=host, model=model, profile=profile, inputs=rest)
    return (plan, inputs) if verdict.is_refused(without) else (without, rest)


def claims_note(stack: str, inputs: PlanInputs, used: PlanInputs) -> str | None:
    """Return a note on the claims that a plan from ``used`` ignored; None if there are none."""
    passed = len(inputs.claims) - len(used.claims)
    if passed == 0:
        return None
    left = list(used.claims)
    names = []
    for claim in claimed_resources.other_claims(inputs.claims, stack):
        if claim in left:
            left.remove(claim)
        else:
            names.append(claim.stack[:40])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(names[:_SHOWN]) + more
    return f"not counted, because the plan would be refused: claims of users for {listed}"


@dataclass(frozen=True)
class _Planner:
    """Plans of one stack from its profile with changes. ``inputs`` hold the claims of others."""

    host: Host
    model: Model
    inputs: PlanInputs

    def with_largest(
        self, profile: Profile, field: str, most: int, step: int, *, together: bool
    ) -> Profile:
        """Return the profile with the largest value of a field whose plan fits.

        If no plan fits, the value is the smallest. If the size of the memory is unknown, there is
        no value, and the engine gets a usual one. If the requests at once are chosen ``together``
        with the context, each of them has room for all of its context.
        """
        engine = find_engine(profile.engine)

        def fits(count: int) -> bool:
            trial = msgspec.structs.replace(profile, **{field: count * step})
            if field == "concurrency" and trial.context == "auto":
                trial = msgspec.structs.replace(
                    trial, context=min(8192, self.model.context or 8192)
                )
            plan, options = self.plan(trial)
            asked = trial.concurrency if together and engine.requests_share_cache else None
            if isinstance(asked, int) and _full_contexts(engine, plan, options) < asked:
                # The engine would make the others wait, but auto gives every request its context.
                return False
            return plan.verdict.fits is not False

        usual = msgspec.structs.replace(profile, **{field: None})
        if self.plan(usual)[0].verdict.fits is None:
            return usual
        found = largest_fitting(1, max(1, most // step), fits)
        return msgspec.structs.replace(profile, **{field: found * step})

    def plan(
        self, profile: Profile, *, asked: Profile | None = None
    ) -> tuple[Plan, Mapping[str, Option]]:
        """Return a plan without "auto" values, and the engine's options by their planned names.

        ``asked`` is the profile before its "auto" values were replaced, if it had any.
        """
        host, model, inputs, claims = self.host, self.model, self.inputs, self.inputs.claims
        engine = find_engine(profile.engine)
        placed = placement.choose_placement(host, profile, claims)
        main = memory.memory_limit(host, placed.placement, claims)
        on_gpu = None
        if placed.gpus:
            on_gpu = memory.gpu_limit(placed.gpus, profile.gpu_reserve_bytes, claims)
        request = self._request(profile, placed, main, on_gpu)
        argv, options, seen = self._options(engine, request)
        gpu_bytes = request.gpu_bytes or (1 if placed.gpus else 0)
        parts = engine.footprint(model, options, gpu_bytes, seen)
        budgets = _budgets(parts, main, on_gpu, len(placed.gpus))
        work = self._work(engine, profile, options, placed)
        calibration = roofline.nearest_calibration(
            inputs.calibrations, profile.engine, work, placed.gpus
        )
        prediction = roofline.predict(host, placed.placement, work, calibration)
        timing, start_deadline = self._timing(engine)
        plan = Plan(
            profile=profile.name,
            stack=profile.stack,
            objective=profile.objective,
            engine=engine.name,
            image=inputs.image,
            argv=argv,
            environment=engine.environment(request),
            placement=placed.placement,
            memory=budgets[0][0],
            host_memory=budgets[1][0] if placed.gpus else None,
            prediction=prediction,
            verdict=verdict.make_verdict(
                profile, work, budgets, prediction, self._notes(profile, placed),
                unknown=roofline.missing_speed_fact(host, placed.placement, work),
            ),
            decisions=(
                *self._image_and_door(profile),
                *placed.decisions,
                *_chosen(engine, options, asked or profile, profile),
                start_deadline,
            ),
            model=model,
            served_name=request.served_name,
            port=_port(profile),
            engine_port=inputs.engine_port,
            memlock_bytes=host.limits.memlock_bytes if engine.locks_model(argv) else None,
            timing=timing,
        )  # fmt: skip
        return plan, options

    def _request(
        self,
        profile: Profile,
        placed: placement.PlacementResult,
        main: memory.UsableMemory,
        on_gpu: memory.UsableMemory | None,
    ) -> EngineRequest:
        """Return the inputs from which an engine chooses its options."""
        return EngineRequest(
            host=self.host,
            model=self.model,
            profile=profile,
            placement=placed.placement,
            threads=placed.threads,
            threads_batch=placed.threads_batch,
            memory_limit_bytes=main.bytes,
            model_path=model_mounts.model_path(self.model),
            served_name=profile.served_name or model_mounts.served_name(self.model),
            port=self.inputs.engine_port or _port(profile),
            behind_door=self.inputs.engine_port is not None,
            gpus=placed.gpus,
            gpu_limit_bytes=on_gpu.bytes if on_gpu else None,
            memory_claimed_bytes=main.claimed,
            gpu_claimed_bytes=on_gpu.claimed if on_gpu else 0,
        )

    def _options(
        self, engine: Engine, request: EngineRequest
    ) -> tuple[tuple[str, ...], dict[str, Option], MeasuredMemory | None]:
        """Return the engine's arguments, its options by their planned names, and the memory that
        was measured in an earlier start (None: no measurement applies)."""
        facts = self.inputs.facts
        dialect = engine.newest if facts is None else Dialect(facts.options, inspected=True)
        planned = (*engine.plan_options(request), *workaround_options(self.inputs.workaround))
        options = engine_arguments.apply_engine_args(engine, dialect, planned, request.profile)
        argv, options = engine_arguments.render_arguments(engine, dialect, options)
        cards = tuple((gpu.name, gpu.memory_bytes) for gpu in request.gpus)
        earlier = tuple(one for one in self.inputs.measured_memory if one.gpus == cards)
        seen, options = engine.apply_measured_memory(earlier, argv, options)
        return argv, options, seen

    def _work(
        self,
        engine: Engine,
        profile: Profile,
        options: Mapping[str, Option],
        placed: placement.PlacementResult,
    ) -> roofline.RooflineInput:
        """Return the bytes that a token reads on GPU and CPU, and the numbers of threads."""
        generate, batch = ((x or (0, ""))[0] for x in (placed.threads, placed.threads_batch))
        if engine.threads_options is not None:
            generate = int_option(options, engine.threads_options[0], generate)
            batch = int_option(options, engine.threads_options[1], batch)
        on_cpu = engine.weights_read_on_cpu(self.model, options, on_gpu=bool(placed.gpus))
        return roofline.RooflineInput(
            model=self.model,
            cpu_bytes=on_cpu,
            gpu_bytes=self.model.active_bytes - on_cpu,
            kv_token_bytes=engine.kv_token_bytes(self.model, options, 1),
            prompt_tokens=profile.slo.prompt_tokens,
            threads=batch or self.host.cpu.cores,
            decode_threads=generate or None,
        )

    def _notes(
        self, profile: Profile, placed: placement.PlacementResult
    ) -> Iterator[verdict.Reason]:
        """Yield notes on the cores and the port that other stacks claim as well."""
        if shared := placed.placement.shared_with:
            yield verdict.Reason("cores-shared", f"cores {placement.sharing_note(shared)}")
        port = _port(profile)
        if owner := claimed_resources.port_owner(self.inputs.claims, port):
            taken = f"port {port} belongs to {owner}: another one by --set port=N"
            yield verdict.Reason("port-claimed", taken)

    def _image_and_door(self, profile: Profile) -> Iterator[Decision]:
        """Yield the decisions on the image, the dialect of the engine in it, and the front door."""
        inputs, facts = self.inputs, self.inputs.facts
        source = _source(profile, "image") if profile.image else "derived"
        yield Decision(field="image", value=inputs.image, reason=inputs.image_reason, source=source)
        yield Decision(
            field="dialect",
            value=(facts.version or "unknown version") if facts else "newest known",
            reason="read from the image's own help" if facts else "image not inspected",
            source="measured" if facts else "derived",
        )
        if inputs.door_reason is not None:
            asked = profile.front_door != "auto"
            yield Decision(
                field="front-door",
                value=_port(profile) if inputs.engine_port else "none",
                reason=inputs.door_reason,
                source=_source(profile, "front_door") if asked else "derived",
            )

    def _timing(self, engine: Engine) -> tuple[Timing, Decision]:
        """Return the deadline of a start with systemd's ceiling, and the decision on the deadline.

        The ceiling is more than twice the deadline, so that systemd never ends a start before
        stackctl.
        """
        size, given = self.model.weights_bytes, self.inputs.deadline_s
        deadline = max(1, round(engine.start_s + size / _READ_BYTES_S if given is None else given))
        derived = f"{engine.start_s:.0f} s and {format_bytes(size)} at 100 MB/s"
        decision = Decision(
            field="start-deadline", value=deadline,
            reason=derived if given is None else "--timeout",
            source="derived" if given is None else "override",
        )  # fmt: skip
        return Timing(deadline_s=deadline, ceiling_s=2 * deadline + 60), decision


def _full_contexts(engine: Engine, plan: Plan, options: Mapping[str, Option]) -> int:
    """Return how many requests of the whole context a shared cache holds at the same time."""
    gpus = max(1, len(plan.placement.gpus))
    context = int_option(options, engine.context_option, 0)
    token = engine.kv_token_bytes(plan.model, options, gpus)
    if not context or not token:
        return _AUTO_REQUESTS
    return int(plan.memory.kv_bytes * gpus / (token * context))


def _budgets(
    parts: Footprint, main: memory.UsableMemory, on_gpu: memory.UsableMemory | None, gpus: int
) -> list[tuple[MemoryBudget, str]]:
    """Return budgets with reasons: that of main memory, or those of each GPU and of main memory."""
    if on_gpu is None:
        return [(memory.memory_budget(parts, main), main.why)]
    # Several GPUs share weights and KV cache evenly; each has its own buffers.
    each = replace(
        parts, weights_bytes=parts.weights_bytes // gpus, kv_bytes=parts.kv_bytes // gpus
    )
    beside = memory.memory_budget(parts.host or Footprint(0, 0, 0), main)
    return [(memory.memory_budget(each, on_gpu), on_gpu.why), (beside, main.why)]


def _chosen(
    engine: Engine, options: Mapping[str, Option], asked: Profile, planned: Profile
) -> Iterator[Decision]:
    """Yield the decisions on the engine's options, with notes on those that were "auto"."""
    keys = {engine.context_option: "context", engine.requests_option: "concurrency"}
    for option in options.values():
        key, reason = keys.get(option.name), option.reason
        if key is not None and getattr(asked, key) == "auto":
            known = getattr(planned, key) is not None
            note = "the most that fits" if known else "memory unknown, so a usual value"
            reason = f"auto: {note}; {reason}"
        yield Decision(field=option.name, value=option.value, reason=reason, source=option.source)


def _port(profile: Profile) -> int:
    return profile.port or 8080


def _source(profile: Profile, key: str) -> DecisionSource:
    return "override" if key in profile.overrides else "profile"
