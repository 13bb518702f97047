"""The protocol of all engines, and the values of its members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from stackctl.engines.failures import Failure
from stackctl.engines.image_recipe import ImageRecipe
from stackctl.engines.options import Dialect, Option
from stackctl.values.diagnosis import Step
from stackctl.values.engine_facts import EngineOption, MeasuredMemory
from stackctl.values.generation import EngineFact
from stackctl.values.host import Gpu, Host
from stackctl.values.metrics import EngineMetrics, LogSamples
from stackctl.values.model import Model, ModelFormat
from stackctl.values.plan import DecisionSource, Placement
from stackctl.values.profile import Profile

#: Where an engine that compiles finds its cache.
CACHE = "/cache"
#: Beginnings of variables that OpenMP, CUDA and the hub's libraries read, which engines use.
LIBRARY_VARIABLES = ("OMP_", "GOMP_", "KMP_", "CUDA_", "HF_")
#: Facts that an engine reports over HTTP: name, path to GET, and the keys to the value in its JSON.
Reports = tuple[tuple[str, str, tuple[str | int, ...]], ...]


@dataclass(frozen=True)
class EngineRequest:
    """The input from which an engine chooses its options.

    ``threads`` is None if the machine's cores are unknown or a GPU does the work.
    ``memory_limit_bytes`` is the main memory that a service may use and ``gpu_limit_bytes`` the
    memory of each GPU, both without the claims of other stacks (the ``claimed`` values).
    """

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

    def listen(self, name: str) -> Option:
        """Return the option of that name for the engine's port."""
        if self.behind_door:
            return Option(name, (self.port,), "private: the front door has the profile's port")
        return Option(name, (self.port,), "clients ask here", "profile")

    def context(self, default: int) -> tuple[int, str | None]:
        """Return the tokens of one request, and the reason if the profile asked for more."""
        wanted, trained = self.profile.context, self.model.context
        if not isinstance(wanted, int):
            return min(default, trained or default), None
        if trained is not None and wanted > trained:
            return trained, f"all the model was trained for, {wanted} tokens were asked for"
        return wanted, None

    def requests(self, throughput: int) -> tuple[int, str]:
        """Return the number of requests at once, and the reason.

        ``throughput`` is the number for that objective if the profile names none.
        """
        one = "one request at a time; given up: others wait"
        many = "decoding together reads the weights once; given up: the speed of one alone"
        wanted = self.profile.concurrency
        if isinstance(wanted, int):
            return wanted, one if wanted == 1 else many
        if self.profile.objective == "latency":
            return 1, f"latency: {one}"
        return throughput, f"throughput: {many}"

    @property
    def gpu_bytes(self) -> int:
        """Return the memory of the smallest GPU in use; 0 if there is none or it is unknown."""
        return min((gpu.memory_bytes or 0 for gpu in self.gpus), default=0)


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose.

    ``compute_bytes`` holds buffers, the engine itself and its host cache of ``cache_bytes``. For a
    plan on a GPU these are bytes of the GPU, and ``host`` is the part in main memory. ``measured``
    is True if the engine itself reported them in an earlier start.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    cache_bytes: int = 0
    host: Footprint | None = None
    measured: bool = False


@dataclass(frozen=True)
class MeasuredSpeeds:
    """Measured speeds in tokens a second, with the mean length of the prompts."""

    decode_tok_s: float
    prefill_tok_s: float
    prompt_tokens: int


@dataclass(frozen=True)
class Benchmark:
    """A program in the engine's image that measures speeds on the CPU, without a server.

    ``arguments`` makes its command line from the model's path and a number of threads. ``speeds``
    reads its output. It returns None for text that the program did not print, and raises a
    StackctlError for output without speeds.
    """

    program: str
    arguments: Callable[[str, int], tuple[str, ...]]
    speeds: Callable[[str], MeasuredSpeeds | None]


@dataclass(frozen=True)
class RunningCounters:
    """Counters of the running server that speeds are computed from.

    ``speeds`` reads the answer to a GET of ``path``. It raises a StackctlError if the server has
    processed too few tokens so far.
    """

    path: str
    speeds: Callable[[str], MeasuredSpeeds]


@dataclass(frozen=True)
class Advice:
    """The parts of the advice to users that differ between engines.

    ``use_gpu`` is the step from a CPU to a GPU. ``large_batches`` are options for the prompt tokens
    of one step, each with a value above which prompts are hardly faster. ``small_batches`` are
    arguments with which the first token comes sooner; None if the engine has none.
    ``cached_tokens_option`` makes each answer report the tokens that the prefix cache had; None if
    answers always do. ``log_mark`` stands in lines of its log that report a speed.
    """

    use_gpu: Step
    large_batches: Mapping[str, int]
    small_batches: str | None
    cached_tokens_option: str | None
    log_mark: str


class LogReader(Protocol):
    """A reader of an engine's log, line by line and in constant memory; it skips other lines."""

    def feed(self, line: str) -> None:
        """Read the next line."""
        ...

    def samples(self) -> LogSamples:
        """Return the samples of all lines so far."""
        ...


class Engine(Protocol):
    """One engine; pure: from values to values.

    The members stand in groups: name and images, placement, options, memory, start and log,
    requests and metrics, verification and advice. A class that derives from this one inherits the
    members that have a value here and defines all others. mypy reports missing ones where the class
    is instantiated: in the registry of engines.
    """

    # Name and images.

    #: Its name in profiles, and in messages to users.
    name: str
    title: str
    #: Image used when the profile names none, and the name under which a local build is kept.
    default_image: str
    local_image: str
    #: The local image for machines without a GPU; None if it is the same.
    cpu_image: str | None = None
    #: Its images that can be built on a machine without a registry.
    image_recipes: tuple[ImageRecipe, ...]
    #: Format of the models that it serves.
    model_format: ModelFormat
    #: Shipped profiles that show how a model would run here, before it is downloaded.
    trial_profiles: tuple[str, ...]
    #: Size of the container's /dev/shm, which its processes share; None: Podman's default of 64 MB.
    shm_bytes: int | None = None
    #: The condition on which systemd starts it again (Restart= of systemd.service(5)).
    restart: Literal["on-failure", "always"]
    #: Seconds from its start to its first answer, besides reading the weights.
    start_s: float
    #: The places where it compiles code, for which it needs a folder that is kept (CACHE).
    compiles: Literal["everywhere", "on GPUs"]
    #: Variables of an image that would override the engine's options.
    conflicting_env: tuple[str, ...] = ()

    # Placement.

    #: True if it runs on GPUs unless the profile refuses them (engines.uses_gpu).
    gpu_by_default: bool
    #: True if it can keep experts of an MoE on the CPU while the rest is on GPUs.
    splits_experts: bool = False
    #: True if a process of it on the CPU keeps its memory on one NUMA node.
    one_node_on_cpu: bool = False

    def usable_gpus(self, count: int) -> tuple[int, str]:
        """Return the number of GPUs, of ``count``, that it can use together, and the reason for
        leaving some out (empty if it uses all)."""
        return count, ""

    def cannot_run(self, model: Model) -> str | None:
        """Return the reason why this engine cannot run a model; None if it can."""
        ...

    # Options.

    #: The engine's program, for an image without an entry point.
    program: str
    #: The entry point of its published images.
    published_entrypoint: tuple[str, ...]
    #: Arguments that make it print all its options.
    help_arguments: tuple[str, ...]
    #: Options that stackctl sets itself, each with the profile key to use instead.
    reserved_options: Mapping[str, str]
    newest: Dialect
    #: Option for the port that it listens on.
    port_option: str = "port"
    #: Options for the tokens that a request may use, and for the requests served at once.
    context_option: str
    requests_option: str
    #: True if ``context_option`` counts the tokens of all requests together.
    shares_context: bool = False
    #: Options for the number of threads that generate, and that compute prompts; None if it has no
    #: such options.
    threads_options: tuple[str, str] | None = None

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """Return the options of the engine's help text; empty for any other text."""
        ...

    def parse_version(self, text: str) -> str | None:
        """Return the version from the engine's output for --version; None if there is none."""
        ...

    def plan_options(self, request: EngineRequest) -> tuple[Option, ...]:
        """Return the options for this machine, model and objective, each with its reason."""
        ...

    def environment(self, request: EngineRequest) -> tuple[str, ...]:
        """Return NAME=VALUE texts for the engine's environment."""
        ...

    def render_option(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """Return the arguments of an option in a dialect; None if the dialect lacks it."""
        ...

    # Memory.

    #: Types of a smaller KV cache that a plan may suggest, least loss first.
    kv_types: tuple[str, ...]
    #: True if requests share one KV cache whatever their number, and wait while it is full. False
    #: if each request at once has its own part of it.
    requests_share_cache: bool = False

    def apply_measured_memory(
        self,
        seen: Sequence[MeasuredMemory],  # noqa: ARG002
        argv: Sequence[str],  # noqa: ARG002
        options: Mapping[str, Option],
    ) -> tuple[MeasuredMemory | None, dict[str, Option]]:
        """Return the measured memory that holds for a start with these arguments, and the options
        with it in their reasons.

        ``seen`` are earlier starts of the same model, image and GPUs, newest first.
        """
        return None, dict(options)

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: MeasuredMemory | None = None,
    ) -> Footprint:
        """Return the memory that the engine takes with these options.

        ``gpu_bytes`` is 0 without a GPU, and ``seen`` the measured memory of an earlier start.
        """
        ...

    def kv_token_bytes(self, model: Model, options: Mapping[str, Option], gpus: int) -> float:
        """Return bytes of the KV cache for one token of a full context, on all GPUs together.

        ``gpus`` is 0 or 1 if it is not split.
        """
        ...

    def weights_read_on_cpu(
        self,
        model: Model,
        options: Mapping[str, Option],  # noqa: ARG002
        *,
        on_gpu: bool,
    ) -> float:
        """Return the bytes of weights that generating one token reads in main memory, once for
        each pass of the layers. The other active weights are read on GPUs."""
        return 0.0 if on_gpu else float(model.active_bytes)

    # Start and log.

    def phase(self, line: str) -> str | None:
        """Return the step of the start that a log line reports; None for other lines."""
        ...

    def failure(self, lines: Sequence[str]) -> Failure | None:
        """Return the cause of a failed start, read from the engine's log; None if it is unknown."""
        ...

    def has_crashed(self, lines: Sequence[str]) -> bool:  # noqa: ARG002
        """Return True if the log reports that the computing process has ended, even if its parent
        lives on."""
        return False

    def facts_from_log(self, lines: Sequence[str]) -> tuple[EngineFact, ...]:
        """Return facts from the log of a start: sizes in bytes and tokens, backends."""
        ...

    def fallback_kernels(self, model: Model, gpus: Sequence[Gpu]) -> tuple[tuple[str, str], ...]:  # noqa: ARG002
        """Return options (name, value) for other kernels, which help if Failure.kernel is set;
        empty if none are known for the model on these GPUs."""
        return ()

    # Requests and metrics.

    #: The way to measure the speed on a machine.
    calibration: Benchmark | RunningCounters
    health_path: str = "/health"
    #: Paths of its API besides those that the front door passes on for every engine.
    client_paths: tuple[str, ...] = ()
    #: Paths whose answers ``parse_metrics`` reads; the first has the counters.
    metrics_paths: tuple[str, ...]
    reports: Reports

    def tokenize_request(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:
        """Return path and body of a request whose answer lists the tokens of a text ("tokens")."""
        ...

    def expected_facts(self, argv: Sequence[str]) -> tuple[EngineFact, ...]:
        """Return the facts that ``reports`` must yield for an engine with these arguments."""
        ...

    def parse_metrics(self, answers: Mapping[str, str], argv: Sequence[str]) -> EngineMetrics:
        """Return the engine's metrics, from the answers by path of its ``metrics_paths`` (without
        those that failed) and the arguments that it was started with."""
        ...

    def log_reader(self) -> LogReader:
        """Return a reader of the speeds in its log."""
        ...

    # Verification and advice.

    advice: Advice
    #: Beginnings of the names of environment variables that it and its libraries read.
    environment_prefixes: tuple[str, ...]
    #: True if the log of a start reports the size of the KV cache.
    logs_kv_cache: bool = False

    def locks_model(self, argv: Sequence[str]) -> bool:  # noqa: ARG002
        """Return True if these arguments make the engine lock its model in memory."""
        return False

    def reduces_kv_cache(self, argv: Sequence[str]) -> bool:
        """Return True if these arguments give the elements of the KV cache 8 bits or fewer."""
        ...

    def is_quantization(self, method: str, reported: str) -> bool:
        """Return True if ``reported``, from the engine's log, is its name for the quantization
        method ``method`` of a model's configuration."""
        return method == reported.lower()


def value_source(request: EngineRequest, key: str) -> DecisionSource:
    """Return the source of the value of a profile key."""
    if key in request.profile.overrides:
        return "override"
    value = getattr(request.profile, key)
    return "derived" if value is None or value == "auto" else "profile"
