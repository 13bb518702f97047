"""The protocol behind which engines differ, and the values it speaks in."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stackctl.engines.image_recipe import ImageRecipe
from stackctl.values.generation import Fact
from stackctl.values.host import Gpu, Host
from stackctl.values.measured import EngineOption, Learned, Seen
from stackctl.values.metrics import EngineMetrics, LogSamples
from stackctl.values.model import Model
from stackctl.values.plan import Placement, Scalar, Source
from stackctl.values.profile import Profile

#: Where an engine that compiles finds its cache.
CACHE = "/cache"
#: What an engine says of itself: name, path to GET, and the keys to the value in its JSON.
Reports = tuple[tuple[str, str, tuple[str | int, ...]], ...]


@dataclass(frozen=True)
class Option:
    """One chosen option by its newest long name. ``values`` is empty for a bare flag, and None when
    the option is left out on purpose; the reason then says why."""

    name: str
    values: tuple[Scalar, ...] | None
    reason: str
    source: Source = "derived"

    @property
    def value(self) -> Scalar:
        """The value as one scalar: True for a bare flag, None when left out."""
        if self.values is None:
            return None
        if not self.values:
            return True
        return self.values[0] if len(self.values) == 1 else " ".join(map(str, self.values))


@dataclass(frozen=True)
class Request:
    """What an engine chooses its options from. ``threads`` is None when the machine's cores are not
    known or a GPU does the work; ``memory_limit_bytes`` is what a service may use of main memory,
    ``gpu_limit_bytes`` of each GPU, after what other stacks claim (the ``claimed`` values)."""

    host: Host
    model: Model
    profile: Profile
    placement: Placement
    threads: tuple[int, str] | None
    threads_batch: tuple[int, str] | None
    memory_limit_bytes: int | None
    model_path: str
    served_name: str
    port: int
    behind_door: bool = False
    gpus: tuple[Gpu, ...] = ()
    gpu_limit_bytes: int | None = None
    memory_claimed_bytes: int = 0
    gpu_claimed_bytes: int = 0

    @property
    def port_option(self) -> Option:
        """The engine's port, which both engines take by the same name."""
        if self.behind_door:
            return Option("port", (self.port,), "private: the front door has the profile's port")
        return Option("port", (self.port,), "clients ask here", "profile")

    @property
    def gpu_bytes(self) -> int:
        """Memory of the smallest of the GPUs used; 0 when there is none or it is unknown."""
        sizes = [gpu.memory_bytes or 0 for gpu in self.gpus]
        return min(sizes, default=0)


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose; ``compute_bytes`` holds buffers, the engine itself and its host cache
    (``cache_bytes`` of them).

    For a plan on a GPU these are the GPU's, and ``host`` is what lies in main memory besides.
    ``measured``: the engine itself said so in an earlier start.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    cache_bytes: int = 0
    host: Footprint | None = None
    measured: bool = False


@dataclass(frozen=True)
class Failure:
    """A failure recognised in an engine's log: cause in one line, its evidence, what to do.

    ``sets`` is the remedy as KEY=VALUE, where the engine named the value. ``kernel``: other kernels
    of the same image are known to do better.
    """

    cause: str
    evidence: str
    remedy: str | None = None
    sets: tuple[str, ...] = ()
    kernel: bool = False


@dataclass(frozen=True)
class Dialect:
    """The options that an image's engine knows, from its own help."""

    options: tuple[EngineOption, ...]
    #: False when the image was not looked at and these are the newest known options only.
    inspected: bool
    _by_name: Mapping[str, EngineOption] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = {name: option for option in self.options for name in option.names}
        object.__setattr__(self, "_by_name", index)

    def find(self, name: str) -> EngineOption | None:
        """The option with that long name (without dashes), matched whole."""
        return self._by_name.get(f"--{name}")

    def names(self) -> tuple[str, ...]:
        """All long names without dashes."""
        return tuple(name[2:] for name in self._by_name if name.startswith("--"))


@dataclass(frozen=True)
class TokenReads:
    """Bytes that are read to generate one token: weights by where they lie, and the KV cache of one
    token of context."""

    cpu_weights_bytes: float
    gpu_weights_bytes: float
    kv_token_bytes: float


@dataclass(frozen=True)
class Speeds:
    """Measured speeds in tokens a second, with the mean length of the prompts."""

    decode_tok_s: float
    prefill_tok_s: float
    prompt_tokens: int


@dataclass(frozen=True)
class Benchmark:
    """A program in the engine's image that measures speeds on the CPU, beside no server.

    ``arguments`` makes its command line from the model's path and a number of threads. ``speeds``
    reads its output: None for output that is none of the program's, and a StackctlError for output
    without speeds.
    """

    program: str
    arguments: Callable[[str, int], tuple[str, ...]]
    speeds: Callable[[str], Speeds | None]


@dataclass(frozen=True)
class RunningCounters:
    """Counters of the running server that speeds are computed from.

    ``speeds`` reads the answer to a GET of ``path``, and raises a StackctlError where the server
    has done too little so far.
    """

    path: str
    speeds: Callable[[str], Speeds]


class LogReader(Protocol):
    """Reads an engine's log line by line, in constant memory; other lines are passed over."""

    def feed(self, line: str) -> None:
        """The next line."""
        ...

    def samples(self) -> LogSamples:
        """What the lines so far say."""
        ...


class Engine(Protocol):
    """One engine; pure: from values to values.

    Members stand in groups: its name and images, its container, placement, options, memory, start
    and log, requests and metrics. Everything is required: an engine that lacks a member is refused
    by the type checker.
    """

    # Name and images.

    #: As profiles spell it, and as messages to users call it.
    name: str
    title: str
    #: Image used when the profile names none, and the name under which a local build is kept.
    default_image: str
    local_image: str
    #: The local image for machines without a GPU, where it is another one.
    cpu_image: str | None
    #: Its images that can be built on a machine without a registry.
    image_recipes: tuple[ImageRecipe, ...]
    #: Format of the models that it serves.
    model_format: Literal["gguf", "safetensors"]
    #: Size of the container's /dev/shm, through which its processes talk; None: podman's own 64 MB.
    shm_bytes: int | None
    #: When systemd starts it again (Restart= of systemd.service(5)).
    restart: Literal["on-failure", "always"]
    #: Seconds from its start to its first answer, besides reading the weights.
    start_s: float
    #: Where it needs a folder that is kept (CACHE in its container) for what is compiled.
    compiles: Literal["everywhere", "on GPUs"]
    #: Variables of an image that would outvote the engine's options.
    overriding: tuple[str, ...]

    # Placement.

    #: Whether it runs on GPUs unless the profile says otherwise (engines.uses_gpu).
    gpu_by_default: bool
    #: Whether it can keep experts of an MoE on the CPU while the rest is on GPUs.
    splits_experts: bool
    #: Whether a process of it on the CPU keeps its memory on one NUMA node.
    one_node_on_cpu: bool

    def usable_gpus(self, count: int) -> tuple[int, str]:
        """Return how many of that many GPUs it can use together, and why not all of them (empty
        if it uses all)."""
        ...

    def cannot_run(self, model: Model) -> str | None:
        """Return the reason why this engine cannot run a model; None if it can."""
        ...

    # Options.

    #: What starts the engine in an image without an entry point of its own.
    program: str
    #: The entry point of its published images.
    published_entrypoint: tuple[str, ...]
    #: What it is asked with for a text of all its options.
    help_arguments: tuple[str, ...]
    #: Options that stackctl sets itself, each with the profile key to use instead.
    reserved: Mapping[str, str]
    newest: Dialect
    #: Options that say how many tokens a request may use, and how many are served at once.
    context_option: str
    requests_option: str
    #: Whether the first of them is for all requests together.
    shares_context: bool
    #: Options for the number of threads that generate, and that compute prompts; None if it has no
    #: such options.
    threads_options: tuple[str, str] | None

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """Options from the engine's help text; empty when it is not such a text."""
        ...

    def parse_version(self, text: str) -> str | None:
        """The version in what the engine prints for --version."""
        ...

    def choose(self, request: Request) -> tuple[Option, ...]:
        """The options for this machine, model and objective, each with its reason."""
        ...

    def environment(self, request: Request) -> tuple[str, ...]:
        """NAME=VALUE texts for the engine's environment."""
        ...

    def spell(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """Arguments for an option in a dialect; None when the dialect has no way to say it."""
        ...

    # Memory.

    #: Types of a smaller KV cache that a plan may suggest, least loss first.
    kv_types: tuple[str, ...]
    #: Whether requests share one KV cache whatever their number, and wait while it is full. If
    #: not, each request at once has its own part of it.
    requests_share_cache: bool

    def recall(
        self, seen: Sequence[Seen], argv: Sequence[str], options: Mapping[str, Option]
    ) -> tuple[Seen | None, dict[str, Option]]:
        """What earlier starts of the same model, image and GPUs (newest first) tell of one with
        these arguments: as much of one of them as holds, and the options that say so."""
        ...

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: Seen | None = None,
    ) -> Footprint:
        """Memory that the engine takes with these options; ``gpu_bytes`` is 0 without a GPU, and
        ``seen`` what holds of an earlier start."""
        ...

    def kv_token_bytes(self, model: Model, options: Mapping[str, Option], gpus: int) -> float:
        """Return bytes of the KV cache for one token of a full context, on all GPUs together;
        ``gpus`` is 0 or 1 where it is not split."""
        ...

    def token_reads(
        self, model: Model, options: Mapping[str, Option], *, on_gpu: bool
    ) -> TokenReads:
        """Return the bytes that generating one token reads, once for each pass of the layers."""
        ...

    def uses_mlock(self, options: Mapping[str, Option]) -> bool:
        """Return True if these options make the engine lock its model in memory."""
        ...

    # Start and log.

    def phase(self, line: str) -> str | None:
        """What the engine is doing, when a log line tells."""
        ...

    def failure(self, lines: Sequence[str]) -> Failure | None:
        """The cause of a failed start, read from the engine's log."""
        ...

    def dead(self, lines: Sequence[str]) -> bool:
        """Whether the log says that what computes has ended, though its parent may live on."""
        ...

    def said(self, lines: Sequence[str]) -> tuple[Fact, ...]:
        """What the log of a start tells of what runs: sizes in bytes and tokens, backends."""
        ...

    def fallback_kernels(self, model: Model, gpus: Sequence[Gpu]) -> tuple[tuple[str, str], ...]:
        """Return options (name, value) for other kernels, which help where Failure.kernel is set;
        empty where none are known for the model on these GPUs."""
        ...

    # Requests and metrics.

    #: The way to measure its speed on a machine.
    calibration: Benchmark | RunningCounters
    health_path: str
    #: Paths of its API besides those that the front door passes on for every engine.
    client_paths: tuple[str, ...]
    #: Counters of its /metrics that are above zero while it has requests.
    running_metrics: tuple[str, ...]
    #: Paths whose answers ``measure`` reads.
    metrics_paths: tuple[str, ...]
    reports: Reports

    def tokenizing(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:
        """Path and body of a request whose answer lists the tokens of a text ("tokens")."""
        ...

    def promised(self, argv: Sequence[str]) -> tuple[Fact, ...]:
        """What ``reports`` must tell of an engine with these arguments."""
        ...

    def measure(self, answers: Mapping[str, str], argv: Sequence[str]) -> EngineMetrics:
        """Its numbers, from the answers of its ``metrics_paths`` (those that answered), and the
        arguments it was started with."""
        ...

    def log_reader(self) -> LogReader:
        """A reader of what its log says of speed."""
        ...


def option(names: str, value: str | None = None) -> EngineOption:
    """An option by its long names without dashes."""
    return EngineOption(names=tuple(f"--{name}" for name in names.split()), value=value)


def origin(request: Request, key: str) -> Source:
    """Where the value of a profile key comes from."""
    if key in request.profile.overrides:
        return "override"
    value = getattr(request.profile, key)
    return "derived" if value is None or value == "auto" else "profile"


def number(options: Mapping[str, Option], name: str, default: int) -> int:
    """The whole number an option was given, else the default."""
    value = options[name].value if name in options else None
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def argument(argv: Sequence[str], name: str) -> str | None:
    """The value of a planned option in a command line: the last one counts."""
    values = [after for word, after in itertools.pairwise(argv) if word == f"--{name}"]
    return values[-1] if values else None


def whole_argument(argv: Sequence[str], name: str) -> int | None:
    """The whole number that a planned option is given in a command line; None for all else."""
    text = argument(argv, name)
    return int(text) if text is not None and _WHOLE.fullmatch(text) else None


#: Engines count in 32 bits.
_WHOLE = re.compile(r"[0-9]{1,10}")
FailureTable = Sequence[tuple[re.Pattern[str], str, str | None]]


def failure_table(*rows: tuple[str, str, str | None]) -> FailureTable:
    """Rows of pattern (any case), cause and remedy, most specific first."""
    return tuple((re.compile(text, re.IGNORECASE), cause, remedy) for text, cause, remedy in rows)


def first_match(lines: Iterable[str], table: FailureTable) -> Failure | None:
    """The first row of a failure table, in its order, that any line matches.

    Cause and remedy may use the pattern's named groups as ``{name}``.
    """
    kept = list(lines)
    for pattern, cause, remedy in table:
        for line in kept:
            if match := pattern.search(line):
                groups = {key: value or "" for key, value in match.groupdict().items()}
                return Failure(
                    cause.format(**groups),
                    line.strip(),
                    remedy.format(**groups) if remedy is not None else None,
                )
    return None


def learned_options(learned: Learned | None) -> tuple[Option, ...]:
    """What an earlier start has shown."""
    if learned is None:
        return ()
    reason = f"this image needs it on this GPU: {learned.why} ({learned.seen[:10]})"
    pairs = (text.partition("=") for text in learned.options)
    return tuple(Option(name, (value,), reason, "measured") for name, _, value in pairs)
