"""A new generation of a stack: planned, with its model and images on this machine, and rendered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from stackctl.deploy import gpu_access, images, planning, preflight
from stackctl.deploy.context import Context
from stackctl.deploy.images import ReadyImage
from stackctl.deploy.model_integrity import require_verified
from stackctl.deploy.planning import PlanBasis, plan_with_alternatives, unit_target
from stackctl.deploy.transaction import RolloutTimeouts
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan.placement import sharing_note
from stackctl.plan.planner import (
    PlanInputs,
    claims_note,
    make_plan,
    make_plan_ignoring_user_claims,
)
from stackctl.plan.verdict import is_refused, plan_summary, refusal
from stackctl.requirements.gpu import DEFAULT_CUDA
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.state.generations import utc_now
from stackctl.units import render
from stackctl.units.proxy_unit import make_proxy
from stackctl.values.engine_facts import EngineWorkaround
from stackctl.values.generation import Generation, Operation, Outcome
from stackctl.values.model import Model
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Profile


@dataclass(frozen=True)
class UpOptions:
    """Options of ``up``, ``switch`` or ``rollback`` besides the profile.

    ``asked`` holds the overrides of the command line, and ``operation`` the command that makes the
    generation. ``fit`` resolves the profile again with more KEY=VALUE. If ``profiles`` are given, a
    refused plan gets alternatives from them.
    """

    deadline_s: float | None = None
    force: bool = False
    dry_run: bool = False
    timeouts: RolloutTimeouts = field(default_factory=RolloutTimeouts)
    asked: Overrides = field(default_factory=Overrides)
    operation: Operation = "up"
    fit: Callable[[tuple[str, ...]], tuple[Profile, Overrides]] | None = None
    profiles: Profiles | None = None


@dataclass(frozen=True)
class GenerationDraft:
    """A new generation without its slot, its port and its number.

    ``door_image`` is the image of its front door, None for a stack without one.
    """

    profile: Profile
    options: UpOptions
    basis: PlanBasis
    model: Model
    inputs: PlanInputs
    image: ReadyImage
    door_image: str | None

    def generation(self, unit: str, port: int | None, number: int) -> Generation:
        """Return the generation, planned for a slot and a private port (None: no front door)."""
        host, inputs = self.basis.host, dataclasses.replace(self.inputs, engine_port=port)
        plan = make_plan(host=host, model=self.model, profile=self.profile, inputs=inputs)
        target = unit_target(self.basis.paths, host, plan, self.image.facts)
        return Generation(
            number=number,
            stack=plan.stack,
            created=utc_now(),
            operation=self.options.operation,
            image=self.image.asked,
            image_id=self.image.image.id,
            units=render.render_units(plan, target, number, unit),
            door=make_proxy(self.profile, plan, self.door_image) if self.door_image else None,
            plan=plan,
            profile=self.profile,
            asked=self.options.asked,
            host=host,
            outcome=Outcome(state="starting", changed=utc_now()),
        )


def draft_generation(
    context: Context,
    basis: PlanBasis,
    profile: Profile,
    options: UpOptions,
    lesson: EngineWorkaround | None,
) -> GenerationDraft:
    """Check the model, pull the images if necessary, and return the inputs of the plan.

    A first plan without an image comes before the pull, so that a refusal costs no download.

    Raises:
        StackctlError: exit 5 if the plan is refused; another code if the model, an image or a GPU
            cannot be used.
    """
    model = read_model(preflight.require_model(profile))
    inputs = planning.inputs_before_image(basis, profile, model, deadline_s=options.deadline_s)
    early, used = make_plan_ignoring_user_claims(
        host=basis.host, model=model, profile=profile, inputs=inputs, binding=basis.binding
    )
    if passed := claims_note(profile.stack, inputs, used):
        context.progress.warn(passed)
    require_startable(basis, profile, early, options)
    require_verified(context, model)
    image, door_image, why_door = images.ready_images(
        context, profile, find_engine(profile.engine), may_pull=not options.dry_run
    )
    inputs = planning.with_image(basis, used, profile, model, image.planned, lesson=lesson)
    inputs = dataclasses.replace(inputs, door_reason=why_door)
    return GenerationDraft(profile, options, basis, model, inputs, image, door_image)


def _assumed_cuda(profile: Profile) -> str | None:
    """Return the CUDA version of the engine's default image; None if the profile names an image,
    whose version is unknown before the pull."""
    return DEFAULT_CUDA if profile.image is None else None


def check_plan(context: Context, draft: GenerationDraft, plan: Plan) -> None:
    """Report the plan with its warnings. Raise StackctlError (exit 5 or 6) if it is refused."""
    require_viable(draft.basis, draft.profile, plan, draft.options)
    if not draft.options.force:
        cuda = draft.image.image.cuda or _assumed_cuda(draft.profile)
        for finding in gpu_access.require_gpus(draft.basis.host, plan, cuda=cuda):
            context.progress.warn(f"{finding.name}: {finding.actual}", finding.remedy)
    context.progress.step("plan", plan_summary(plan))
    if plan.placement.shared_with:
        context.progress.warn(f"cores {sharing_note(plan.placement.shared_with)}")


def require_startable(basis: PlanBasis, profile: Profile, plan: Plan, options: UpOptions) -> None:
    """Check a plan before anything is pulled or downloaded for it.

    Raises:
        StackctlError: exit 6 if the plan cannot have its GPUs, exit 5 if it is refused.
    """
    if not options.force:
        gpu_access.require_gpus(basis.host, plan, cuda=_assumed_cuda(profile))
    require_viable(basis, profile, plan, options)


def require_viable(basis: PlanBasis, profile: Profile, plan: Plan, options: UpOptions) -> None:
    """Raise StackctlError (exit 5) for a plan that does not fit or is not viable."""
    if options.force or not is_refused(plan):
        return
    if options.profiles is not None:
        plan = plan_with_alternatives(basis, options.profiles, profile, plan)
    headline, reasons = refusal(plan)
    helps = ("what helps, best first", *plan.verdict.alternatives, "--force: start it anyway")
    raise StackctlError(
        headline,
        details=reasons,
        hint="\n".join(helps),
        exit_code=ExitCode.REFUSED,
    )
