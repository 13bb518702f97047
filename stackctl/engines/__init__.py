"""What differs by engine: sizing, arguments and dialects, endpoints, log phases, known failures."""

from __future__ import annotations

from stackctl.engines.engine import Engine
from stackctl.engines.llamacpp import LlamaCpp
from stackctl.engines.vllm import Vllm
from stackctl.values.plan import Plan

_ENGINES: dict[str, Engine] = {"llama.cpp": LlamaCpp(), "vllm": Vllm()}


def engine(name: str) -> Engine:
    """The engine of that name, as profiles spell it."""
    return _ENGINES[name]


def engines() -> tuple[Engine, ...]:
    """All engines."""
    return tuple(_ENGINES.values())


def promised_context(plan: Plan) -> int | None:
    """Tokens that one request may use, by the plan's arguments; None where they leave it open."""
    facts = engine(plan.engine).promised(plan.argv)
    values = (fact.value for fact in facts if fact.name == "context")
    return next((int(value) for value in values if value.isdecimal()), None)
