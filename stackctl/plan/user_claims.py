"""Plans that ignore claims which do not bind: those of ordinary users, if root plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stackctl.plan import claimed_resources
from stackctl.plan.planner import PlanInputs, make_plan
from stackctl.values.claim import Claim
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile

_SHOWN = 3


def make_plan_ignoring_user_claims(
    *, host: Host, model: Model, profile: Profile, inputs: PlanInputs, binding: Sequence[Claim]
) -> tuple[Plan, PlanInputs]:
    """Make a plan as ``make_plan``; if it is refused only for claims that do not bind, ignore
    these.

    Returns:
        The plan and its inputs. Without the ignored claims, the inputs hold the ``binding`` ones.

    Raises:
        StackctlError: as ``make_plan``.
    """
    plan = make_plan(host=host, model=model, profile=profile, inputs=inputs)
    rest = dataclasses.replace(inputs, claims=tuple(binding))
    if not is_refused(plan) or len(rest.claims) == len(inputs.claims):
        return plan, inputs
    without = make_plan(host=host, model=model, profile=profile, inputs=rest)
    return (plan, inputs) if is_refused(without) else (without, rest)


def is_refused(plan: Plan) -> bool:
    """Return True if a plan is known not to fit or not to be worth running."""
    return plan.verdict.fits is False or plan.verdict.viable is False


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
