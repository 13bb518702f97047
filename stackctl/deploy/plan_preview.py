"""Plans without a deployment, and the alternatives to a refused plan."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial

import msgspec

from stackctl.deploy import engine_port, images, plan_inputs
from stackctl.deploy.context import Progress
from stackctl.deploy.images import PlannedImage
from stackctl.deploy.plan_inputs import PlanBasis
from stackctl.deploy.preflight import require_model
from stackctl.engines import engine, uses_gpu
from stackctl.errors import StackctlError
from stackctl.machine.http_download import ConnectionLost
from stackctl.plan.user_claims import claims_note, is_refused, make_plan_ignoring_user_claims
from stackctl.plan.verdict import is_viable, with_alternatives
from stackctl.sources.hub_cache import ModelNotCached, parse_remote
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.state.engine_facts_cache import EngineFactsCache
from stackctl.store import hub
from stackctl.store.remote_header import read_remote
from stackctl.values.model import Model
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Profile


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
    door, why_door, port = None, None, None
    if basis.live:
        image = images.image_for_planning(
            profile, engine(profile.engine), EngineFactsCache(basis.paths.cache)
        )
        door, why_door = images.proxy_image_for_planning(profile)
        port = None if door is None else _engine_port(basis, profile)
    else:
        image = images.image_of_another_machine(profile, engine(profile.engine))
    inputs = plan_inputs.inputs_before_image(basis, profile, model)
    inputs = plan_inputs.with_image(basis, inputs, profile, model, image)
    inputs = dataclasses.replace(inputs, door_reason=why_door, engine_port=port)
    plan, used = make_plan_ignoring_user_claims(
        host=basis.host, model=model, profile=profile, inputs=inputs, binding=basis.binding
    )
    return PlanPreview(plan, image, door, claims_note(profile.stack, inputs, used))


def _read_model(basis: PlanBasis, profile: Profile, progress: Progress) -> Model:
    """Return the facts of a profile's model, from its files or from its hub."""
    source = require_model(profile)
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
    return next(filter(None, own), None) or engine_port.allocate_engine_port(
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
                plans.append(plan_profile(basis, own, read_model(own.model)).plan)
    return plans, moved


def _with_model(own: Profile, refused: Plan) -> Profile | None:
    """Return a GPU profile of the same engine with the refused plan's model, else None."""
    on_gpu = own.engine == refused.engine and uses_gpu(own)
    suits = own.placement.cpu_experts is None or refused.model.experts
    if not on_gpu or not suits or own.model == refused.model.source:
        return None
    return msgspec.structs.replace(own, model=refused.model.source, served_name=None)
