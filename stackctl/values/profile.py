"""Profiles: what the user wants. ``ProfileFile`` is the YAML as written, ``Profile`` the result."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stackctl.values.base import Value
from stackctl.values.plan import Scalar

Objective = Literal["latency", "throughput"]
Argument = bool | int | float | str

NAME_PATTERN = "^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
#: A reference, and never one of podman's options.
ImageName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
Count = Annotated[int, Meta(ge=1, le=4096)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Tokens = Annotated[int, Meta(ge=16, le=2**27)]


class PlacementWish(Value, frozen=True, kw_only=True):
    """Where the engine should run; what is left out follows from the topology.

    ``policy`` is the memory policy over the NUMA nodes, ``nodes`` the nodes (a list such as "0-1"),
    ``cpus`` the CPUs (a list such as "0-13"), ``gpus`` the GPUs by index ("0", "0-1", "all", or
    "none": vLLM on the CPU).
    ``cpu_experts`` keeps the experts of an MoE's first layers on the CPU: a number of layers, or
    auto for as few as the GPU's memory asks for.
    """

    policy: Literal["auto", "default", "bind", "interleave"] = "auto"
    nodes: str | int | None = None
    cpus: str | int | None = None
    gpus: str | int | None = None
    cpu_experts: Literal["auto"] | int | None = None


class Slo(Value, frozen=True, kw_only=True):
    """What is fast enough (95th percentile): the first token of a prompt of ``prompt_tokens``
    within ``ttft_s`` seconds, the next ones within ``itl_ms`` milliseconds, and at least
    ``min_tok_s`` generated tokens a second. ``min_prefix_hits`` is the share of prompt tokens, 0
    to 1, that the engine is to find in its prefix cache. What is left out is not asked for."""

    prompt_tokens: Annotated[int, Meta(ge=1, le=2**27)] = 4640
    ttft_s: Annotated[float, Meta(gt=0)] | None = None
    itl_ms: Annotated[float, Meta(gt=0)] | None = None
    min_tok_s: Annotated[float, Meta(gt=0)] | None = None
    min_prefix_hits: Annotated[float, Meta(gt=0, le=1)] | None = None

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        wishes = (self.ttft_s, self.itl_ms, self.min_tok_s, self.min_prefix_hits)
        return any(wish is not None for wish in wishes)


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a profile sets, at its top level or for one objective."""

    model: Annotated[
        str | None, Meta(description="where the model comes from, e.g. file:/srv/models/m.gguf")
    ] = None
    image: Annotated[
        ImageName | None,
        Meta(description="container image; left out: the image built here, else the engine's own"),
    ] = None
    context: Annotated[
        Tokens | Literal["auto"] | None,
        Meta(description="tokens each request may use, prompt and answer; auto: all that fits"),
    ] = None
    concurrency: Annotated[
        Count | Literal["auto"] | None,
        Meta(description="requests served at the same time; auto: as many as fit"),
    ] = None
    kv_type: Annotated[
        str | None, Meta(description="type of the KV cache, e.g. f16, q8_0 (llama.cpp), fp8 (vllm)")
    ] = None
    gpu_reserve: Annotated[
        str | None, Meta(description="GPU memory left free, e.g. 4 GiB (the default)")
    ] = None
    slo: Slo | None = None
    port: Annotated[Port | None, Meta(description="TCP port that clients use")] = None
    address: Annotated[
        str | None,
        Meta(description="where it listens: 127.0.0.1; any other address needs api_key and a door"),
    ] = None
    api_key: Annotated[
        bool | None, Meta(description="ask clients for a key (stackctl key); needs the front door")
    ] = None
    front_door: Annotated[
        Literal["auto", "on", "off"] | None,
        Meta(
            description="HAProxy before the engine, so that requests wait during a switch; "
            "auto: where its image is here"
        ),
    ] = None
    served_name: Annotated[
        str | Annotated[list[str], Meta(min_length=1)] | None,
        Meta(
            description="the model's name in the API, or a list: its name, and others that clients "
            "may ask for; default: the file's name"
        ),
    ] = None
    placement: PlacementWish | None = None
    trust_remote_code: Annotated[
        bool | None,
        Meta(
            description="vllm: run Python code that lies beside the weights; only of a model from "
            "the hub, whose commit is known"
        ),
    ] = None
    engine_args: Annotated[
        dict[str, Argument | list[Argument] | None],
        Meta(
            description="options passed to the engine as they are; they win over the plan. "
            "Long names without dashes; true for a bare flag, false to leave a planned one out"
        ),
    ] = msgspec.field(default_factory=dict)


class Objectives(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings that apply for one objective only."""

    latency: Settings = msgspec.field(default_factory=Settings)
    throughput: Settings = msgspec.field(default_factory=Settings)


class ProfileFile(Settings, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stackctl profile."""

    description: str | None = None
    extends: Annotated[Name | None, Meta(description="the profile this one starts from")] = None
    engine: Annotated[str | None, Meta(description="the engine that serves the model")] = None
    stack: Annotated[
        Name | None, Meta(description="the name it runs under; default: the profile's own")
    ] = None
    objective: Annotated[Objective | None, Meta(description="the default objective")] = None
    objectives: Objectives = msgspec.field(default_factory=Objectives)


class Overrides(Value, frozen=True, kw_only=True):
    """What the command line says of a profile: ``sets`` are KEY=VALUE texts, the rest options by
    name. Kept with a generation, so that a switch can ask for the same again."""

    sets: tuple[str, ...] = ()
    model: str | None = None
    objective: str | None = None
    name: str | None = None


class EngineArgument(Value, frozen=True, kw_only=True):
    """One explicit engine option, its long name without dashes, and the values it is given.

    An empty ``values`` is a bare flag; None leaves a planned option out.
    """

    name: str
    values: tuple[Scalar, ...] | None = None


class Profile(Value, frozen=True, kw_only=True):
    """A profile with everything it extends, its objective and the overrides applied.

    What is None was not said and is derived by the plan. ``overrides`` names the keys that the
    command line set, ``files`` where the profile was read from, most specific first.
    """

    schema: Literal["stackctl.profile/1"] = "stackctl.profile/1"
    name: str
    description: str | None = None
    #: A name of the registry of engines, which the reader of profiles checks.
    engine: str
    stack: str
    objective: Objective
    model: str | None = None
    image: str | None = None
    context: int | Literal["auto"] | None = None
    concurrency: int | Literal["auto"] | None = None
    kv_type: str | None = None
    gpu_reserve_bytes: int = 4 * 2**30
    slo: Slo = Slo()
    port: int | None = None
    address: str = "127.0.0.1"
    api_key: bool = False
    front_door: Literal["auto", "on", "off"] = "auto"
    served_name: str | None = None
    #: Names besides that clients may ask for.
    other_names: tuple[str, ...] = ()
    placement: PlacementWish = PlacementWish()
    trust_remote_code: bool = False
    engine_args: tuple[EngineArgument, ...] = ()
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def on_cpu(self) -> bool:
        """Whether an engine that is made for GPUs is to do without."""
        return self.placement.gpus == "none"
