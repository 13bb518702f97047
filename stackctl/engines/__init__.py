"""What differs by engine: sizing, arguments and dialects, endpoints, log phases, known failures."""

from __future__ import annotations

from stackctl.engines.engine import Engine
from stackctl.engines.llamacpp import LlamaCpp
from stackctl.engines.vllm import Vllm

_ENGINES: dict[str, Engine] = {"llama.cpp": LlamaCpp(), "vllm": Vllm()}


def engine(name: str) -> Engine:
    """The engine of that name, as profiles spell it."""
    return _ENGINES[name]


def engines() -> tuple[Engine, ...]:
    """All engines."""
    return tuple(_ENGINES.values())
