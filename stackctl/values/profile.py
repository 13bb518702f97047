"""Profiles, the wishes of the user. ``ProfileFile`` is the YAML, ``Profile`` the resolved form."""

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
#: An image reference; the pattern excludes texts that podman would take for options.
ImageName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
Count = Annotated[int, Meta(ge=1, le=4096)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Tokens = Annotated[int, Meta(ge=16, le=2**27)]


class PlacementRequest(Value, frozen=True, kw_only=True):
    """The CPUs, nodes and GPUs of the engine. The plan derives missing keys from the topology."""

    policy: Annotated[
        Literal["auto", "default", "bind", "interleave"],
        Meta(
            description="memory policy over the NUMA nodes: bind (only these nodes), interleave "
            "(pages spread over them), default (the kernel's own); auto: by engine and machine"
        ),
    ] = "auto"
    nodes: Annotated[
        str | int | None,
        Meta(description='NUMA nodes, a list such as "0-1"; default: all that have memory'),
    ] = None
    cpus: Annotated[
        str | int | None,
        Meta(description='CPUs, a list such as "0-13"; default: cores that no other stack claims'),
    ] = None
    gpus: Annotated[
        str | int | None,
        Meta(
            description='GPUs by index, "0", "0-1" or "all"; "none": run on the CPU; default: one '
            "GPU for engines that need one, else none"
        ),
    ] = None
    cpu_experts: Annotated[
        Literal["auto"] | int | None,
        Meta(
            description="MoE layers whose experts stay in main memory beside a GPU, for engines "
            "that can; auto: as few as the GPU's memory allows; default: none"
        ),
    ] = None


class Slo(Value, frozen=True, kw_only=True):
    """Service-level objectives for TTFT, ITL, speed and prefix-cache hits.

    An objective that is None is not checked.
    """

    prompt_tokens: Annotated[
        int, Meta(ge=1, le=2**27, description="length of the prompt that ttft_s applies to, tokens")
    ] = 4640
    ttft_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="longest time to the first token (TTFT), seconds, 95th percentile"),
    ] = None
    itl_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="longest time between tokens (ITL), milliseconds, 95th percentile"),
    ] = None
    min_tok_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="lowest generation speed of one request, tokens per second"),
    ] = None
    min_prefix_hits: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="lowest share of prompt tokens that come from the prefix cache"),
    ] = None

    @property
    def has_objectives(self) -> bool:
        """Return True if at least one objective is set."""
        wishes = (self.ttft_s, self.itl_ms, self.min_tok_s, self.min_prefix_hits)
        return any(wish is not None for wish in wishes)


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Keys that a profile may set at its top level and for one objective."""

    model: Annotated[
        str | None,
        Meta(
            description="source of the model: file:PATH, dir:FOLDER, hf:ORG/REPO[@REV][:QUANT] or "
            "https://HOST/NAME.gguf; catalogue:ID, fetched from the repository that the catalogue "
            "names; facts:FILE for plans only"
        ),
    ] = None
    image: Annotated[
        ImageName | None,
        Meta(
            description="container image; default: the engine's image built on this machine, else "
            "the one that the engine publishes"
        ),
    ] = None
    context: Annotated[
        Tokens | Literal["auto"] | None,
        Meta(
            description="tokens that one request may use, prompt and answer; auto: all that fits; "
            "default: the engine's usual context, at most the model's own"
        ),
    ] = None
    concurrency: Annotated[
        Count | Literal["auto"] | None,
        Meta(
            description="requests served at the same time; auto: as many as fit; default: 1 for "
            "latency, the engine's usual number for throughput"
        ),
    ] = None
    kv_type: Annotated[
        str | None,
        Meta(
            description="data type of the KV cache, as the engine names it, e.g. f16, q8_0, fp8; "
            "default: the engine's own"
        ),
    ] = None
    gpu_reserve: Annotated[
        str | None, Meta(description="memory of each GPU that stays free, a size such as 4 GiB")
    ] = None
    slo: Annotated[
        Slo | None,
        Meta(description="service-level objectives; a plan that would miss them is refused"),
    ] = None
    port: Annotated[Port | None, Meta(description="TCP port that clients use; default: 8080")] = (
        None
    )
    address: Annotated[
        str | None,
        Meta(
            description="IP address that clients use; any other than 127.0.0.1 needs api_key and "
            "the front door"
        ),
    ] = None
    api_key: Annotated[
        bool | None,
        Meta(description="require an API key from clients (stackctl key); needs the front door"),
    ] = None
    front_door: Annotated[
        Literal["auto", "on", "off"] | None,
        Meta(
            description="HAProxy before the engine: requests wait during a switch; auto: on if its "
            "image is present"
        ),
    ] = None
    served_name: Annotated[
        str | Annotated[list[str], Meta(min_length=1)] | None,
        Meta(
            description="name of the model in the API, or a list: the name, then aliases; default: "
            "the file's name without its ending"
        ),
    ] = None
    placement: Annotated[
        PlacementRequest | None, Meta(description="CPUs, NUMA nodes and GPUs that the engine uses")
    ] = None
    trust_remote_code: Annotated[
        bool | None,
        Meta(
            description="run Python code from the model's repository, if the engine can; only for "
            "models from the hub's cache, whose commit is known"
        ),
    ] = None
    engine_args: Annotated[
        dict[str, Argument | list[Argument] | None],
        Meta(
            description="options for the engine, which override the plan: long names without "
            "dashes; true: a flag without value; false: leave out a planned option"
        ),
    ] = msgspec.field(default_factory=dict)


class Objectives(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings that apply for one objective only."""

    latency: Annotated[
        Settings, Meta(description="settings for short answers to one user at a time")
    ] = msgspec.field(default_factory=Settings)
    throughput: Annotated[
        Settings, Meta(description="settings for most tokens per second over all requests")
    ] = msgspec.field(default_factory=Settings)


class ProfileFile(Settings, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stackctl profile."""

    description: Annotated[str | None, Meta(description="one line about the profile")] = None
    extends: Annotated[
        Name | None,
        Meta(description="profile whose keys apply where this one sets none; may be its own name"),
    ] = None
    engine: Annotated[str | None, Meta(description="the engine that serves the model")] = None
    stack: Annotated[
        Name | None, Meta(description="name of the stack; default: the name of the profile")
    ] = None
    objective: Annotated[
        Objective | None,
        Meta(description="objective unless the command line sets one; default: latency"),
    ] = None
    objectives: Annotated[
        Objectives, Meta(description="settings that apply for one objective only")
    ] = msgspec.field(default_factory=Objectives)


class Overrides(Value, frozen=True, kw_only=True):
    """Settings from the command line: ``sets`` are KEY=VALUE texts, the other fields are options.

    A generation stores them, so that a switch applies them again.
    """

    sets: tuple[str, ...] = ()
    model: str | None = None
    objective: str | None = None
    name: str | None = None


class EngineArgument(Value, frozen=True, kw_only=True):
    """One explicit engine option: its long name without dashes, and its values.

    An empty ``values`` is a bare flag; None leaves a planned option out.
    """

    name: str
    values: tuple[Scalar, ...] | None = None


class Profile(Value, frozen=True, kw_only=True):
    """A profile with everything it extends, its objective and the overrides applied.

    The plan derives values for keys that are None. ``overrides`` names the keys that the command
    line set. ``files`` are the files that the profile was read from, most specific first.
    """

    schema: Literal["stackctl.profile/1"] = "stackctl.profile/1"
    name: str
    description: str | None = None
    #: A name in the registry of engines; the reader of profiles checks it.
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
    #: Further names of the model that clients may use.
    other_names: tuple[str, ...] = ()
    placement: PlacementRequest = PlacementRequest()
    trust_remote_code: bool = False
    engine_args: tuple[EngineArgument, ...] = ()
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def forces_cpu(self) -> bool:
        """Return True if the profile excludes GPUs (``gpus: none``)."""
        return self.placement.gpus == "none"
