"""A plan: every number with its reason. The document ``stackctl.plan/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.cpulist import CpuList
from stackctl.values.model import Model

Source = Literal["override", "profile", "measured", "derived", "catalogue", "engine-default"]
Policy = Literal["default", "bind", "interleave", "preferred"]
Scalar = bool | int | float | str | None
#: The subjects of a verdict's reasons: of memory, of the time to the first token, of the speed of
#: generation, of the model's size, and of things that the stack shares with others.
ReasonCode = Literal[
    "memory-fits",
    "memory-exceeded",
    "memory-shortage",
    "memory-unknown",
    "first-token-missed",
    "first-token-at-risk",
    "generation-missed",
    "generation-at-risk",
    "generation-speed",
    "model-size",
    "speed-unknown",
    "cores-shared",
    "port-claimed",
]


class Decision(Value, frozen=True, kw_only=True):
    """One planned value, why it is so, and where it comes from."""

    field: str
    value: Scalar = None
    reason: str
    source: Source


class Placement(Value, frozen=True, kw_only=True):
    """Where the engine runs: CPU list, memory nodes, GPUs, and the memory policy over the nodes.

    ``cpuset`` says that ``cpus`` (and, bound, ``mems``) are enforced by the cpuset controller;
    otherwise they are what it should use, and the scheduler decides. ``shared_with`` names the
    stacks that claim some of the same cores.
    """

    cpus: CpuList | None = None
    mems: CpuList | None = None
    gpus: tuple[str, ...] = ()
    policy: Policy = "default"
    cpuset: bool = False
    shared_with: tuple[str, ...] = ()


class MemoryBudget(Value, frozen=True, kw_only=True):
    """Bytes the engine will take against what it may take, in one pool: "memory", "GPU 0", or "each
    GPU of 0,1" for what every one of several GPUs holds.

    ``compute_bytes`` holds compute buffers, the engine itself and its host cache of prompts seen
    before, which ``cache_bytes`` of them are at most. ``basis`` says whether the engine itself told
    the sizes, in an earlier start with the same settings.
    """

    pool: str = "memory"
    basis: Literal["measured", "estimated"] = "estimated"
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    cache_bytes: int = 0
    total_bytes: int
    limit_bytes: int | None = None
    headroom_bytes: int | None = None


class PromptTime(Value, frozen=True, kw_only=True):
    """Seconds to the first token of a prompt of that length."""

    prompt_tokens: int
    range: tuple[float, float] | None = None


class Prediction(Value, frozen=True, kw_only=True):
    """Expected speed as ranges (low, high) in tokens a second; None where nothing is known.

    ``performance_factor`` is decode tokens a second over billions of parameters; ``basis`` says
    whether this machine was measured or the ranges come from general constants.
    """

    decode_tok_s: tuple[float, float] | None = None
    prefill_tok_s: tuple[float, float] | None = None
    ttft_s: PromptTime | None = None
    performance_factor: tuple[float, float] | None = None
    basis: Literal["measured", "estimated"] | None = None


class Verdict(Value, frozen=True, kw_only=True):
    """Whether it fits the machine and is worth running; None where nothing is known.

    ``codes`` holds the subject of each of the ``reasons``, in the same order.
    """

    viable: bool | None = None
    fits: bool | None = None
    reasons: tuple[str, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    alternatives: tuple[str, ...] = ()


class Timing(Value, frozen=True, kw_only=True):
    """Seconds allowed for the start: stackctl's soft deadline, and systemd's ceiling above."""

    deadline_s: int
    ceiling_s: int


class Plan(Value, frozen=True, kw_only=True):
    """All that is needed to render units, and why."""

    schema: Literal["stackctl.plan/1"] = "stackctl.plan/1"
    profile: str
    stack: str
    objective: str
    engine: str
    image: str
    argv: tuple[str, ...]
    environment: tuple[str, ...] = ()
    placement: Placement
    memory: MemoryBudget
    #: What a plan for a GPU takes of main memory besides.
    host_memory: MemoryBudget | None = None
    prediction: Prediction
    verdict: Verdict
    decisions: tuple[Decision, ...]
    model: Model
    served_name: str
    #: Where clients ask.
    port: int
    #: The engine's own port on loopback, where a front door has the one above.
    engine_port: int | None = None
    #: The locked-memory limit the engine needs; None when it locks nothing.
    memlock_bytes: int | None = None
    timing: Timing

    @property
    def listens(self) -> int:
        """The port on which the engine itself listens."""
        return self.engine_port or self.port
