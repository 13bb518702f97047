"""The engines that stackctl runs, one package each, and the registry that finds them by name.

A new engine is a package here that implements ``protocol.Engine`` and stands in ``ENGINES``.
"""

from __future__ import annotations

import msgspec

from stackctl.engines.llamacpp.engine import LlamaCpp
from stackctl.engines.options import int_option_in_argv
from stackctl.engines.protocol import Engine
from stackctl.engines.vllm.engine import Vllm
from stackctl.errors import ExitCode, StackctlError, did_you_mean
from stackctl.values.model import Model
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile

#: The engines by name, as profiles spell it.
ENGINES: dict[str, Engine] = {"llama.cpp": LlamaCpp(), "vllm": Vllm()}


def engine(name: str) -> Engine:
    """Return the engine of that name, as profiles spell it.

    Raises:
        StackctlError: exit 2 if no engine of that name is registered.
    """
    found = ENGINES.get(name)
    if found is None:
        raise StackctlError(
            f"unknown engine {name!r}", hint=suggestion(name), exit_code=ExitCode.USAGE
        )
    return found


def suggestion(name: str) -> str:
    """Return a hint for an unknown name: the most similar name, else all names."""
    return did_you_mean(name, ENGINES, "engines: " + ", ".join(ENGINES))


def uses_gpu(profile: Profile) -> bool:
    """Return True if a profile's engine runs on GPUs: the profile names some, or the engine uses
    them by default and the profile does not refuse them."""
    if profile.placement.gpus is None:
        return engine(profile.engine).gpu_by_default
    return not profile.forces_cpu


def with_unsupported(model: Model) -> Model:
    """Return the model with the engines that cannot run it, each as "ENGINE: reason"."""
    reasons = ((one.name, one.cannot_run(model)) for one in ENGINES.values())
    return msgspec.structs.replace(
        model, unsupported=tuple(f"{name}: {reason}" for name, reason in reasons if reason)
    )


def planned_threads(plan: Plan) -> int | None:
    """Return the generating threads by the plan's arguments; None if they leave it open."""
    names = engine(plan.engine).threads_options
    return int_option_in_argv(plan.argv, names[0]) if names is not None else None


def context_per_request(plan: Plan) -> int | None:
    """Return the tokens that one request may use; None if the plan's arguments leave it open."""
    facts = engine(plan.engine).expected_facts(plan.argv)
    values = (fact.value for fact in facts if fact.name == "context")
    return next((int(value) for value in values if value.isdecimal()), None)
