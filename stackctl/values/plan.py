"""A plan with the reasons of its decisions, and the claims of installed stacks."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.cpu_list import CpuList
from stackctl.values.model import Model

DecisionSource = Literal[
    "override", "profile", "measured", "derived", "catalogue", "engine-default"
]
Policy = Literal["default", "bind", "interleave", "preferred"]
Scalar = bool | int | float | str | None
#: The subjects of a verdict's reasons: memory, time to the first token, generation speed, size of
#: the model, and resources that the stack shares with other stacks.
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
    """One planned value with its reason and its source."""

    field: str
    value: Scalar = None
    reason: str
    source: DecisionSource


class Placement(Value, frozen=True, kw_only=True):
    """The CPUs, memory nodes and GPUs of an engine, and the memory policy over the nodes.

    ``cpuset``: the cpuset controller enforces ``cpus`` and, with the policy bind, ``mems``. Without
    it they are advice, and the scheduler decides. ``shared_with`` names the stacks that claim some
    of the same cores.
    """

    cpus: CpuList | None = None
    mems: CpuList | None = None
    gpus: tuple[str, ...] = ()
    policy: Policy = "default"
    cpuset: bool = False
    shared_with: tuple[str, ...] = ()


class MemoryBudget(Value, frozen=True, kw_only=True):
    """The memory that an engine needs, and the limit, in bytes of one pool.

    ``pool`` is "memory", "GPU 0", or "each GPU of 0,1" for the memory of each of several GPUs.
    ``compute_bytes`` are compute buffers, the engine itself and its host cache of earlier prompts;
    that cache takes at most ``cache_bytes``. ``basis`` is "measured" if the engine reported the
    sizes in an earlier start with the same settings.
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
    """The range (low, high) of seconds to the first token, for one length of prompt."""

    prompt_tokens: int
    range: tuple[float, float] | None = None


class Prediction(Value, frozen=True, kw_only=True):
    """The expected speed, as ranges (low, high) in tokens per second; None: unknown.

    ``performance_factor`` is decode tokens per second divided by billions of parameters. ``basis``
    is "measured" with a calibration of this machine, "estimated" with general constants.
    """

    decode_tok_s: tuple[float, float] | None = None
    prefill_tok_s: tuple[float, float] | None = None
    ttft_s: PromptTime | None = None
    performance_factor: tuple[float, float] | None = None
    basis: Literal["measured", "estimated"] | None = None


class Verdict(Value, frozen=True, kw_only=True):
    """The judgement of a plan: does it fit the machine, is it fast enough; None: unknown.

    ``codes`` holds the subject of each of the ``reasons``, in the same order.
    """

    viable: bool | None = None
    fits: bool | None = None
    reasons: tuple[str, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    alternatives: tuple[str, ...] = ()


class Timing(Value, frozen=True, kw_only=True):
    """Seconds allowed for the start: stackctl's deadline, and systemd's limit, which is higher."""

    deadline_s: int
    ceiling_s: int


class Plan(Value, frozen=True, kw_only=True):
    """All decisions for one stack: the input for its units, with the reasons."""

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
    #: The main memory that a plan for a GPU needs in addition.
    host_memory: MemoryBudget | None = None
    prediction: Prediction
    verdict: Verdict
    decisions: tuple[Decision, ...]
    model: Model
    served_name: str
    #: The port of the clients.
    port: int
    #: The engine's own port on loopback, if a front door listens on ``port``.
    engine_port: int | None = None
    #: The locked-memory limit that the engine needs; None if it locks nothing.
    memlock_bytes: int | None = None
    timing: Timing

    @property
    def engine_listen_port(self) -> int:
        """Return the port on which the engine itself listens."""
        return self.engine_port or self.port


class GpuShare(Value, frozen=True, kw_only=True):
    """Bytes of one GPU's memory that a stack reserves; the GPU is named by its index."""

    index: int
    bytes: int


class Claim(Value, frozen=True, kw_only=True):
    """The resources that an installed stack reserves, so that the next plan does not use them.

    ``mems`` are the NUMA nodes that its main memory is bound to; empty if any node may hold it.
    """

    stack: str
    cpus: CpuList = CpuList()
    mems: CpuList = CpuList()
    memory_bytes: int = 0
    gpus: tuple[GpuShare, ...] = ()
    port: int | None = None
    engine_port: int | None = None
