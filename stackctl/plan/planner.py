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
    served_name,
    verdict,
)
from stackctl.plan.suggestions import largest_fitting, suggest_changes
from stackctl.quantity import format_bytes
from stackctl.values.calibration import Calibration
from stackctl.values.claim import Claim
from stackctl.values.engine_facts import EngineFacts, EngineWorkaround, MeasuredMemory
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Decision, DecisionSource, MemoryBudget, Placement, Plan, Timing
from stackctl.values.profile import Profile

#: Bytes per second of the slowest storage that a start waits for: a hard disk.
_READ_BYTES_S = 100e6
#: Step in which "auto" searches a context, in tokens, and the most requests that it plans.
_AUTO_STEP = 256
_AUTO_REQUESTS = 256


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
    wanted, together = profile, profile.concurrency == "auto"
    for field, most, step in (
        ("concurrency", _AUTO_REQUESTS, 1),
        ("context", model.context or 131072, _AUTO_STEP),
    ):
        if getattr(profile, field) == "auto":
            wanted = _largest(
                host, model, wanted, inputs, claims, field, most, step, together=together
            )
    plan, _ = _plan(host, model, wanted, inputs, claims, asked=profile)
    if plan.verdict.fits is not False:
        return plan

    def attempt(changed: Profile, beside: Sequence[Claim]) -> Plan:
        return _plan(host, model, changed, inputs, tuple(beside), asked=changed)[0]

    changes = suggest_changes(host, model, wanted, plan, claims, attempt)
    verdict = msgspec.structs.replace(plan.verdict, alternatives=changes)
    return msgspec.structs.replace(plan, verdict=verdict)


def _largest(
    host: Host,
    model: Model,
    profile: Profile,
    inputs: PlanInputs,
    claims: tuple[Claim, ...],
    field: str,
    most: int,
    step: int,
    *,
    together: bool,
) -> Profile:
    """Return the profile with the largest value of a field whose plan fits.

    If no plan fits, the value is the smallest. If the size of the memory is unknown, there is no
    value, and the engine gets a usual one.
    """

    engine = find_engine(profile.engine)

    def fits(count: int) -> bool:
        trial = msgspec.structs.replace(profile, **{field: count * step})
        if field == "concurrency" and trial.context == "auto":
            trial = msgspec.structs.replace(trial, context=min(8192, model.context or 8192))
        plan, options = _plan(host, model, trial, inputs, claims, asked=trial)
        asked = trial.concurrency if together and engine.requests_share_cache else None
        if isinstance(asked, int) and _full_contexts(engine, plan, options) < asked:
            # The engine would make the others wait, but auto gives every request its context.
            return False
        return plan.verdict.fits is not False

    usual = msgspec.structs.replace(profile, **{field: None})
    if _plan(host, model, usual, inputs, claims, asked=usual)[0].verdict.fits is None:
        return usual
    found = largest_fitting(1, max(1, most // step), fits)
    return msgspec.structs.replace(profile, **{field: found * step})


def _full_contexts(engine: Engine, plan: Plan, options: Mapping[str, Option]) -> int:
    """Return how many requests of the whole context a shared cache holds at the same time."""
    gpus = max(1, len(plan.placement.gpus))
    context = int_option(options, engine.context_option, 0)
    token = engine.kv_token_bytes(plan.model, options, gpus)
    if not context or not token:
        return _AUTO_REQUESTS
    return int(plan.memory.kv_bytes * gpus / (token * context))


def _plan(
    host: Host,
    model: Model,
    profile: Profile,
    inputs: PlanInputs,
    claims: tuple[Claim, ...],
    *,
    asked: Profile,
) -> tuple[Plan, Mapping[str, Option]]:
    """Return a plan without "auto" values, and the engine's options by their planned names."""
    engine = find_engine(profile.engine)
    result = placement.choose_placement(host, profile, claims)
    main = memory.memory_limit(host, result.placement, claims)
    on_gpu = (
        memory.gpu_limit(result.gpus, profile.gpu_reserve_bytes, claims) if result.gpus else None
    )
    request = _request(host, model, profile, inputs, result, main, on_gpu)
    argv, options, seen = _options(engine, request, inputs)
    gpu_bytes = request.gpu_bytes or (1 if result.gpus else 0)
    parts = engine.footprint(model, options, gpu_bytes, seen)
    main_budget, host_budget, budgets = _budgets(parts, main, on_gpu, len(result.gpus))
    work = _work(engine, model, profile, options, result, host)
    calibration = roofline.nearest_calibration(
        inputs.calibrations, profile.engine, work, result.gpus
    )
    prediction = roofline.predict(host, result.placement, work, calibration)
    port = profile.port or 8080
    notes = _shared(result.placement, claims, port)
    timing = _timing(engine, model, inputs.deadline_s)
    plan = Plan(
        profile=profile.name,
        stack=profile.stack,
        objective=profile.objective,
        engine=engine.name,
        image=inputs.image,
        argv=argv,
        environment=engine.environment(request),
        placement=result.placement,
        memory=main_budget,
        host_memory=host_budget,
        prediction=prediction,
        verdict=verdict.make_verdict(
            profile,
            model,
            work,
            budgets,
            prediction,
            notes,
            unknown=roofline.missing_speed_fact(host, result.placement, work),
        ),
        decisions=(
            *_image(profile, inputs),
            *_door(profile, inputs),
            *result.decisions,
            *_chosen(engine, options, asked, profile),
            _deadline(engine, model, inputs, timing),
        ),
        model=model,
        served_name=request.served_name,
        port=port,
        engine_port=inputs.engine_port,
        memlock_bytes=host.limits.memlock_bytes if engine.locks_model(argv) else None,
        timing=timing,
    )
    return plan, options


def _chosen(
    engine: Engine, options: Mapping[str, Option], asked: Profile, planned: Profile
) -> Iterator[Decision]:
    """Yield the decisions on the engine's options."""
    for option in options.values():
        reason = _auto(engine, option, asked, planned)
        yield Decision(field=option.name, value=option.value, reason=reason, source=option.source)


def _request(
    host: Host,
    model: Model,
    profile: Profile,
    inputs: PlanInputs,
    result: placement.PlacementResult,
    main: memory.UsableMemory,
    on_gpu: memory.UsableMemory | None,
) -> EngineRequest:
    """Return the inputs from which an engine chooses its options."""
    return EngineRequest(
        host=host,
        model=model,
        profile=profile,
        placement=result.placement,
        threads=result.threads,
        threads_batch=result.threads_batch,
        memory_limit_bytes=main.bytes,
        model_path=model_mounts.model_path(model),
        served_name=profile.served_name or served_name.served_name(model),
        port=inputs.engine_port or profile.port or 8080,
        behind_door=inputs.engine_port is not None,
        gpus=result.gpus,
        gpu_limit_bytes=on_gpu.bytes if on_gpu else None,
        memory_claimed_bytes=main.claimed,
        gpu_claimed_bytes=on_gpu.claimed if on_gpu else 0,
    )


def _options(
    engine: Engine, request: EngineRequest, inputs: PlanInputs
) -> tuple[tuple[str, ...], dict[str, Option], MeasuredMemory | None]:
    """Return the engine's arguments, its options by their planned names, and the memory that was
    measured in an earlier start (None: no measurement applies)."""
    facts = inputs.facts
    dialect = engine.newest if facts is None else Dialect(facts.options, inspected=True)
    planned = (*engine.plan_options(request), *workaround_options(inputs.workaround))
    options = engine_arguments.apply_engine_args(engine, dialect, planned, request.profile)
    argv, options = engine_arguments.render_arguments(engine, dialect, options)
    cards = tuple((gpu.name, gpu.memory_bytes) for gpu in request.gpus)
    earlier = tuple(one for one in inputs.measured_memory if one.gpus == cards)
    seen, options = engine.apply_measured_memory(earlier, argv, options)
    return argv, options, seen


def _shared(placed: Placement, claims: Sequence[Claim], port: int) -> list[verdict.Reason]:
    """Return notes on the cores and the port that other stacks claim as well."""
    notes = []
    if placed.shared_with:
        sharing = f"cores {placement.sharing_note(placed.shared_with)}"
        notes.append(verdict.Reason("cores-shared", sharing))
    if owner := claimed_resources.port_owner(claims, port):
        taken = f"port {port} belongs to {owner}: another one by --set port=N"
        notes.append(verdict.Reason("port-claimed", taken))
    return notes


def _image(profile: Profile, inputs: PlanInputs) -> tuple[Decision, Decision]:
    """Return the decisions on the image and the dialect of the engine in it."""
    facts = inputs.facts
    image = Decision(
        field="image",
        value=inputs.image,
        reason=inputs.image_reason,
        source=_source(profile, "image") if profile.image else "derived",
    )
    dialect = Decision(
        field="dialect",
        value=(facts.version or "unknown version") if facts else "newest known",
        reason="read from the image's own help" if facts else "image not inspected",
        source="measured" if facts else "derived",
    )
    return image, dialect


def _deadline(engine: Engine, model: Model, inputs: PlanInputs, timing: Timing) -> Decision:
    """Return the decision on the time that a start may take."""
    derived = f"{engine.start_s:.0f} s and {format_bytes(model.weights_bytes)} at 100 MB/s"
    return Decision(
        field="start-deadline",
        value=timing.deadline_s,
        reason=derived if inputs.deadline_s is None else "--timeout",
        source="derived" if inputs.deadline_s is None else "override",
    )


def _door(profile: Profile, inputs: PlanInputs) -> tuple[Decision, ...]:
    if inputs.door_reason is None:
        return ()
    return (
        Decision(
            field="front-door",
            value=profile.port or 8080 if inputs.engine_port else "none",
            reason=inputs.door_reason,
            source=_source(profile, "front_door") if profile.front_door != "auto" else "derived",
        ),
    )


def _budgets(
    parts: Footprint, main: memory.UsableMemory, on_gpu: memory.UsableMemory | None, gpus: int
) -> tuple[MemoryBudget, MemoryBudget | None, list[tuple[MemoryBudget, str]]]:
    """Return the budget of the main pool, that of main memory beside GPUs, and all with reasons.

    The main pool is the memory of each GPU, or main memory without GPUs; the second is then None.
    """
    if on_gpu is None:
        budget = memory.memory_budget(parts, main)
        return budget, None, [(budget, main.why)]
    # Several GPUs share weights and KV cache evenly; each has its own buffers.
    count = max(1, gpus)
    each = replace(
        parts, weights_bytes=parts.weights_bytes // count, kv_bytes=parts.kv_bytes // count
    )
    gpu_budget = memory.memory_budget(each, on_gpu)
    beside = parts.host or Footprint(0, 0, 0)
    host_budget = memory.memory_budget(beside, main)
    return gpu_budget, host_budget, [(gpu_budget, on_gpu.why), (host_budget, main.why)]


def _work(
    engine: Engine,
    model: Model,
    profile: Profile,
    options: Mapping[str, Option],
    result: placement.PlacementResult,
    host: Host,
) -> roofline.RooflineInput:
    """Return the bytes that a token reads on GPU and CPU, and the numbers of threads."""
    batch, generate = ((x or (0, ""))[0] for x in (result.threads_batch, result.threads))
    reads = engine.token_reads(model, options, on_gpu=bool(result.gpus))
    threads = engine.threads_options
    return roofline.RooflineInput(
        model=model,
        cpu_bytes=reads.cpu_weights_bytes,
        gpu_bytes=reads.gpu_weights_bytes,
        kv_token_bytes=reads.kv_token_bytes,
        prompt_tokens=profile.slo.prompt_tokens,
        threads=(int_option(options, threads[1], batch) if threads else batch) or host.cpu.cores,
        decode_threads=(int_option(options, threads[0], generate) if threads else generate) or None,
    )


def _auto(engine: Engine, option: Option, asked: Profile, planned: Profile) -> str:
    """Return the reason of an option, with a note if the profile asked for "auto"."""
    by_option = {engine.context_option: "context", engine.requests_option: "concurrency"}
    field = by_option.get(option.name)
    if field is None or getattr(asked, field) != "auto":
        return option.reason
    if getattr(planned, field) is None:
        return f"auto: memory unknown, so a usual value; {option.reason}"
    return f"auto: the most that fits; {option.reason}"


def _source(profile: Profile, key: str) -> DecisionSource:
    return "override" if key in profile.overrides else "profile"


def _timing(engine: Engine, model: Model, deadline_s: float | None) -> Timing:
    """Return the deadline of a start and systemd's ceiling.

    The ceiling is more than twice the deadline, so that systemd never ends a start before stackctl.
    """
    if deadline_s is None:
        deadline_s = engine.start_s + model.weights_bytes / _READ_BYTES_S
    deadline = max(1, round(deadline_s))
    return Timing(deadline_s=deadline, ceiling_s=2 * deadline + 60)
