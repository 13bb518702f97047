"""Plans for a machine: the inputs of the planner, previews, and alternatives to a refused plan."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from stackctl.deploy import gpu_access, images, preflight
from stackctl.deploy.context import Progress
from stackctl.deploy.images import PlannedImage
from stackctl.engines import engine as find_engine
from stackctl.engines import uses_gpu
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.http_download import ConnectionLost
from stackctl.machine.machine import Machine
from stackctl.plan import claimed_resources
from stackctl.plan.placement import choose_placement
from stackctl.plan.planner import PlanInputs, claims_note, make_plan_ignoring_user_claims
from stackctl.plan.verdict import is_refused, is_viable, with_alternatives
from stackctl.probe import probe
from stackctl.sources.hub_cache import ModelNotCached, parse_remote
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.state import claims
from stackctl.state.generations import Generations
from stackctl.state.learned_facts import (
    EngineFactsCache,
    calibrations,
    measured_memory,
    workaround,
)
from stackctl.state.paths import Paths
from stackctl.store import hub
from stackctl.store.remote_models import read_remote
from stackctl.units.render import UnitTarget
from stackctl.values.base import from_json
from stackctl.values.engine_facts import Calibration, EngineFacts, EngineWorkaround, MeasuredMemory
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Claim, Plan
from stackctl.values.profile import Overrides, Profile

#: Smaller models only show that a machine serves; they replace no larger model.
_TRIAL_PARAMETERS: Final = 2 * 10**9


@dataclass(frozen=True)
class PlanBasis:
    """The machine that plans are made for, with its records of stacks and speeds.

    ``claims`` are the claims of all stacks whose units can be read, ``binding`` the claims among
    them that a plan of this user must respect. ``live`` is False for a machine from a file of
    facts: its records are unknown, and this machine is not read.
    """

    paths: Paths
    machine: Machine
    host: Host
    claims: tuple[Claim, ...] = ()
    binding: tuple[Claim, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    live: bool = True

    @property
    def generations(self) -> Generations:
        """Return the stored generations of the scope."""
        return Generations(self.paths.state)


def read_basis(paths: Paths, machine: Machine) -> PlanBasis:
    """Probe this machine and read its records."""
    return PlanBasis(
        paths=paths,
        machine=machine,
        host=probe(machine, scope=paths.scope),
        claims=claims.installed_claims(machine, paths),
        binding=claims.enforceable_claims(machine, paths),
        calibrations=calibrations(paths.state),
    )


def read_basis_file(paths: Paths, machine: Machine, facts: Path) -> PlanBasis:
    """Read the facts of a machine from a file in the form of ``stackctl probe --json``.

    Raises:
        StackctlError: exit 2 for a file that cannot be read or is not valid.
    """
    try:
        text = facts.read_bytes()
    except OSError as error:
        raise StackctlError(
            f"cannot read {facts}: {error.strerror}", exit_code=ExitCode.USAGE
        ) from None
    return PlanBasis(paths, machine, from_json(text, Host, where=str(facts)), live=False)


def inputs_before_image(
    basis: PlanBasis, profile: Profile, model: Model, *, deadline_s: float | None = None
) -> PlanInputs:
    """Return the inputs of a plan whose image is not known yet.

    The plan then uses the options of the newest known dialect, and the memory that earlier starts
    of the model have shown with any image.
    """
    measured = measured_memory(basis.generations, profile.stack, model) if basis.live else ()
    return PlanInputs(
        image="",
        image_reason="",
        claims=basis.claims,
        calibrations=basis.calibrations,
        measured_memory=measured,
        deadline_s=deadline_s,
    )


def with_image(
    basis: PlanBasis,
    inputs: PlanInputs,
    profile: Profile,
    model: Model,
    image: PlannedImage,
    *,
    lesson: EngineWorkaround | None = None,
) -> PlanInputs:
    """Return the inputs with an image, and with the records of earlier starts of that image.

    Without the image's facts no records of earlier starts are used. ``lesson`` holds options that
    help after a start that has just failed; None reads the stored ones.

    Raises:
        StackctlError: exit 2 or 6 for a placement that the machine cannot have.
    """
    measured: tuple[MeasuredMemory, ...] = ()
    if image.facts is not None and basis.live:
        image_id = image.facts.image_id
        measured = measured_memory(basis.generations, profile.stack, model, image_id)
        if lesson is None:
            # Options that the image needed on the GPU that the stack will get.
            others = claimed_resources.other_claims(inputs.claims, profile.stack)
            gpus = [gpu.name for gpu in choose_placement(basis.host, profile, others).gpus]
            lesson = workaround(basis.paths.state, image_id, *gpus[:1])
    return dataclasses.replace(
        inputs,
        image=image.reference,
        image_reason=image.reason,
        facts=image.facts,
        measured_memory=measured,
        workaround=lesson,
    )


def unit_target(paths: Paths, host: Host, plan: Plan, facts: EngineFacts | None) -> UnitTarget:
    """Return the target for the units of a plan; the host's Podman decides which keys they use.

    With ``facts`` None the image is assumed to start as published images or images built here do,
    and ``IMAGE`` stands for its id in the path of the cache.
    """
    if facts is not None:
        program, entrypoint, image_id = facts.program, facts.entrypoint, facts.image_id
    else:
        engine, image_id = find_engine(plan.engine), "IMAGE"
        # An image that was built here has no entry point.
        local = plan.image in (engine.local_image, engine.cpu_image)
        program, entrypoint = images.start_command(
            engine, () if local else engine.published_entrypoint
        )
    return UnitTarget(
        scope=paths.scope,
        podman=host.tools.podman,
        image=plan.image,
        program=program,
        entrypoint=entrypoint,
        claim=claimed_resources.claim_of(plan),
        devices=gpu_access.cdi_names(gpu_access.planned_gpus(host, plan)),
        cache=str(paths.compile_cache(image_id)),
        apparmor=host.tools.apparmor is True,
    )


@dataclass(frozen=True)
class PlanPreview:
    """A plan, its image, and the image of its front door (None: no front door).

    ``passed`` names the claims of other users that the plan does not count.
    """

    plan: Plan
    image: PlannedImage
    door: str | None = None
    passed: str | None = None


def preview(
    basis: PlanBasis, profiles: Profiles, profile: Profile, progress: Progress
) -> PlanPreview:
    """Plan a profile; a refused plan gets alternatives.

    A model that is not on this machine is planned by the metadata of its hub.

    Raises:
        StackctlError: the profile cannot be planned on this machine, or its model cannot be read.
    """
    planned = plan_profile(basis, profile, _read_model(basis, profile, progress))
    if planned.passed:
        progress.warn(planned.passed)
    return dataclasses.replace(
        planned, plan=plan_with_alternatives(basis, profiles, profile, planned.plan)
    )


def plan_with_alternatives(
    basis: PlanBasis, profiles: Profiles, profile: Profile, plan: Plan
) -> Plan:
    """Return a refused plan with alternatives from all profiles; any other plan unchanged."""
    if not is_refused(plan):
        return plan
    candidates, moved = _candidates(basis, profiles, plan)
    verdict = with_alternatives(plan, profile, candidates, moved)
    return msgspec.structs.replace(plan, verdict=verdict)


def plan_profile(basis: PlanBasis, profile: Profile, model: Model) -> PlanPreview:
    """Plan a profile for a model, with the local image or the image that would be pulled.

    Raises:
        StackctlError: as ``plan.planner.make_plan``.
    """
    cache = EngineFactsCache(basis.paths.cache) if basis.live else None
    image = images.image_for_planning(profile, find_engine(profile.engine), cache)
    door, why_door, port = None, None, None
    if basis.live:
        door, why_door = images.proxy_image_for_planning(profile)
        port = None if door is None else _engine_port(basis, profile)
    inputs = inputs_before_image(basis, profile, model)
    inputs = with_image(basis, inputs, profile, model, image)
    inputs = dataclasses.replace(inputs, door_reason=why_door, engine_port=port)
    plan, used = make_plan_ignoring_user_claims(
        host=basis.host, model=model, profile=profile, inputs=inputs, binding=basis.binding
    )
    return PlanPreview(plan, image, door, claims_note(profile.stack, inputs, used))


def _read_model(basis: PlanBasis, profile: Profile, progress: Progress) -> Model:
    """Return the facts of a profile's model, from its files or from its hub."""
    source = preflight.require_model(profile)
    try:
        return read_model(source)
    except ModelNotCached:
        parsed = parse_remote(source)
        if parsed is None or parsed.url is not None or hub.offline_variable():
            raise
        progress.progress("model", f"asking for {source}")
        with contextlib.suppress(ConnectionLost):
            return read_remote(
                source, parsed, basis.paths.cache, partial(progress.progress, "model")
            )
        raise


def _engine_port(basis: PlanBasis, profile: Profile) -> int:
    """Return the engine's port behind the front door: that of the stack's claim, or a free port."""
    own = (claim.engine_port for claim in basis.claims if claim.stack == profile.stack)
    return next(filter(None, own), None) or preflight.allocate_engine_port(
        basis.machine, basis.generations, profile, basis.claims
    )


def _candidates(
    basis: PlanBasis, profiles: Profiles, refused: Plan
) -> tuple[list[Plan], list[str]]:
    """Plan all profiles that have a model, for this machine.

    The best alternative is the same model on a GPU. So a GPU profile is planned with the refused
    plan's model first, and with its own model only if that plan is not viable.

    Returns:
        The plans, and the names of the profiles that were planned with the refused plan's model.
    """
    plans, moved = [], []
    for name in profiles.names():
        # A profile that cannot run here is no alternative.
        with contextlib.suppress(StackctlError):
            own = profiles.resolve(name, Overrides())
            same = _with_model(own, refused)
            if same is not None:
                plan = plan_profile(basis, same, refused.model).plan
                if is_viable(plan):
                    plans.append(plan)
                    moved.append(name)
                    continue
            if own.model is not None:
                model = read_model(own.model)
                if model.parameters >= min(_TRIAL_PARAMETERS, refused.model.parameters):
                    plans.append(plan_profile(basis, own, model).plan)
    return plans, moved


def _with_model(own: Profile, refused: Plan) -> Profile | None:
    """Return a GPU profile of the same engine with the refused plan's model, else None."""
    on_gpu = own.engine == refused.engine and uses_gpu(own)
    suits = own.placement.cpu_experts is None or refused.model.experts
    if not on_gpu or not suits or own.model == refused.model.source:
        return None
    return msgspec.structs.replace(own, model=refused.model.source, served_name=None)
