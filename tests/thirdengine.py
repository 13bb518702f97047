"""A third engine that only tests define, to find code that relies on the shipped engines.

Its options, log, paths and metrics differ from those of the shipped engines, so that code which
relies on one of their names fails with it.

As a program it registers two engines of that kind, "stub-gpu" (made for GPUs) and "stub-cpu", and
runs stackctl: ``python3 thirdengine.py ARGUMENT...``. ``stubserver.pl`` in tests/lab is the server.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from stackctl import engines
from stackctl.engines.failures import Failure, failure_table, first_match
from stackctl.engines.image_recipe import ImageRecipe
from stackctl.engines.options import (
    Dialect,
    Option,
    int_option,
    int_option_in_argv,
    option,
    option_in_argv,
)
from stackctl.engines.prometheus_text import Scrape
from stackctl.engines.protocol import (
    CACHE,
    Advice,
    Benchmark,
    EngineRequest,
    Footprint,
    LogReader,
    MeasuredSpeeds,
    Reports,
    RunningCounters,
    value_source,
)
from stackctl.values.diagnosis import Step
from stackctl.values.engine_facts import EngineOption, MeasuredMemory
from stackctl.values.generation import EngineFact
from stackctl.values.host import Gpu
from stackctl.values.metrics import EngineMetrics, LogSamples, LogWindow
from stackctl.values.model import Model, ModelFormat

_MIB = 2**20
_GIB = 2**30
_CONTEXT = 4096
_NEWEST = (
    option("weights", "FILE"), option("public-name", "NAME"), option("bind", "ADDRESS"),
    option("listen", "PORT"), option("window", "N"), option("lanes", "N"),
    option("workers", "N"), option("cache-format", "TYPE"), option("device", "PLACE"),
    option("gpu-budget", "MIB"),
)  # fmt: skip
_ENTRY = re.compile(r"--([a-z-]+) <([A-Z]+)>")
_SPEED = re.compile(
    r"^\[stub ([\d.]+)s\] speed: prompt ([\d.]+)/s, text ([\d.]+)/s, "
    r"(\d+) running, (\d+) waiting, cache ([\d.]+)%"
)
_OWN = re.compile(r"^\[stub [\d.]+s\] ")
_PHASES = (("reading weights", "reading weights"), ("ready on", "answering"))
_FAILURES = failure_table(
    (
        r"cache of (?P<most>\d+) tokens cannot hold a window",
        "the cache holds only {most} tokens",
        "--set context={most}",
    ),
)
_FACTS = (
    ("weights_bytes", re.compile(r"weights use (\d+) bytes")),
    ("device", re.compile(r"computing on (\w+)")),
)


def _speeds(text: str) -> MeasuredSpeeds:
    seen = Scrape(text)
    prompt, text_s = (seen.total(f"stub_{name}_seconds") or 1.0 for name in ("prompt", "text"))
    return MeasuredSpeeds(
        decode_tok_s=(seen.total("stub_text_tokens") or 0.0) / text_s,
        prefill_tok_s=(seen.total("stub_prompt_tokens") or 0.0) / prompt,
        prompt_tokens=512,
    )


class StubEngine:
    """See Engine."""

    shm_bytes: int | None = None
    cpu_image: str | None = None
    image_recipes: tuple[ImageRecipe, ...] = ()
    model_format: ModelFormat = "gguf"
    trial_profiles: tuple[str, ...] = ()
    restart: Literal["on-failure", "always"] = "on-failure"
    start_s: float = 45
    compiles: Literal["everywhere", "on GPUs"] = "on GPUs"
    conflicting_env: tuple[str, ...] = ("STUB_WINDOW",)
    splits_experts = False
    one_node_on_cpu = False
    program = "stub-server"
    published_entrypoint: tuple[str, ...] = ("stub-server",)
    help_arguments: tuple[str, ...] = ("--options",)
    reserved_options: Mapping[str, str] = {
        "listen": "use the key port",
        "weights": "use the key model",
    }
    newest = Dialect(_NEWEST, inspected=False)
    port_option = "listen"
    context_option = "window"
    requests_option = "lanes"
    shares_context = False
    threads_options: tuple[str, str] | None = ("workers", "workers")
    kv_types: tuple[str, ...] = ("half",)
    requests_share_cache = False
    health_path = "/livez"
    client_paths: tuple[str, ...] = ("/stub/generate",)
    metrics_paths: tuple[str, ...] = ("/metrics",)
    advice = Advice(
        use_gpu=Step(do="buy a GPU"),
        large_batches={"burst": 64},
        small_batches=None,
        cached_tokens_option=None,
        log_mark="[stub 10.0s] speed:",
    )
    environment_prefixes: tuple[str, ...] = ("STUB_",)
    logs_kv_cache = False
    reports: Reports = (("context", "/about", ("window",)), ("lanes", "/about", ("lanes",)))

    calibration: Benchmark | RunningCounters = RunningCounters("/metrics", _speeds)

    def __init__(self, *, gpu: bool) -> None:
        """Make the engine for GPUs, or the one for CPUs."""
        self.gpu_by_default = gpu
        self.name = "stub-gpu" if gpu else "stub-cpu"
        self.title = "Stub"
        self.local_image = f"localhost/lab/{self.name}:1"
        self.default_image = f"registry.example/{self.name}:1"

    def usable_gpus(self, count: int) -> tuple[int, str]:
        """See Engine."""
        return min(count, 1), "it uses one GPU" if count > 1 else ""

    def cannot_run(self, model: Model) -> str | None:
        """See Engine."""
        return "too many experts" if (model.experts or 0) > 64 else None

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """See Engine."""
        return tuple(
            EngineOption(names=(f"--{name}",), value=value) for name, value in _ENTRY.findall(text)
        )

    def parse_version(self, text: str) -> str | None:
        """See Engine."""
        match = re.search(r"^stub (\S+)", text, re.MULTILINE)
        return match[1] if match else None

    def plan_options(self, request: EngineRequest) -> tuple[Option, ...]:
        """See Engine."""
        profile = request.profile
        wanted = profile.context if isinstance(profile.context, int) else _CONTEXT
        window = min(wanted, request.model.context or wanted)
        lanes = profile.concurrency if isinstance(profile.concurrency, int) else 1
        options = [
            Option("weights", (request.model_path,), "the model"),
            Option("public-name", (request.served_name,), "the name clients ask for"),
            Option("bind", ("127.0.0.1",), "loopback only"),
            request.listen("listen"),
            Option("window", (window,), "tokens a request", value_source(request, "context")),
            Option("lanes", (lanes,), "requests at once", value_source(request, "concurrency")),
            Option("device", ("gpu" if request.gpus else "cpu",), "by placement"),
        ]
        if request.gpus and request.gpu_limit_bytes is not None:
            mib = request.gpu_limit_bytes // _MIB
            options.append(Option("gpu-budget", (mib,), "all that is left of the GPU"))
        if request.threads is not None:
            count, why = request.threads
            options.append(Option("workers", (count,), why))
        if profile.kv_type is not None:
            options.append(Option("cache-format", (profile.kv_type,), "profile", "profile"))
        return tuple(options)

    def environment(self, request: EngineRequest) -> tuple[str, ...]:
        """See Engine."""
        return (f"STUB_CACHE={CACHE}",) if request.gpus else ()

    def render_option(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """See Engine."""
        if option.values is None:
            return ()
        if dialect.find(option.name) is None:
            return None
        return (f"--{option.name}", *(str(value) for value in option.values))

    def apply_measured_memory(
        self, seen: Sequence[MeasuredMemory], argv: Sequence[str], options: Mapping[str, Option]
    ) -> tuple[MeasuredMemory | None, dict[str, Option]]:
        """See Engine."""
        return None, dict(options)

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: MeasuredMemory | None = None,
    ) -> Footprint:
        """See Engine. Every lane has a cache of its own."""
        tokens = int_option(options, "window", _CONTEXT) * int_option(options, "lanes", 1)
        kv = round(self.kv_token_bytes(model, options, 1) * tokens)
        if not gpu_bytes:
            return Footprint(model.weights_bytes, kv, 128 * _MIB)
        host = Footprint(0, 0, 128 * _MIB)
        return Footprint(model.weights_bytes, kv, _GIB, host=host)

    def kv_token_bytes(self, model: Model, options: Mapping[str, Option], gpus: int) -> float:
        """See Engine."""
        if model.kv is None:
            return 0.0
        half = "cache-format" in options and options["cache-format"].value == "half"
        row = model.kv.key_dim + model.kv.value_dim
        return sum(model.kv.kv_heads) * row * (1.0 if half else 2.0)

    def weights_read_on_cpu(
        self, model: Model, options: Mapping[str, Option], *, on_gpu: bool
    ) -> float:
        """See Engine."""
        return 0.0 if on_gpu else float(model.active_bytes)

    def phase(self, line: str) -> str | None:
        """See Engine."""
        return next((phase for words, phase in _PHASES if words in line), None)

    def failure(self, lines: Sequence[str]) -> Failure | None:
        """See Engine."""
        return first_match(lines, _FAILURES)

    def fallback_kernels(self, model: Model, gpus: Sequence[Gpu]) -> tuple[tuple[str, str], ...]:
        """See Engine."""
        return ()

    def has_crashed(self, lines: Sequence[str]) -> bool:
        """See Engine."""
        return False

    def facts_from_log(self, lines: Sequence[str]) -> tuple[EngineFact, ...]:
        """See Engine."""
        found = ((name, pattern.search(line)) for line in lines for name, pattern in _FACTS)
        return tuple(
            {n: EngineFact(name=n, value=match[1]) for n, match in found if match}.values()
        )

    def tokenize_request(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:
        """See Engine."""
        return "/stub/tokens", {"text": text}

    def expected_facts(self, argv: Sequence[str]) -> tuple[EngineFact, ...]:
        """See Engine."""
        told = (
            ("context", option_in_argv(argv, "window")),
            ("lanes", option_in_argv(argv, "lanes")),
        )
        return tuple(EngineFact(name=name, value=value) for name, value in told if value)

    def parse_metrics(self, answers: Mapping[str, str], argv: Sequence[str]) -> EngineMetrics:
        """See Engine."""
        seen = Scrape(answers.get("/metrics", ""))
        window = int_option_in_argv(argv, "window") or 0
        lanes = int_option_in_argv(argv, "lanes") or 1
        return EngineMetrics(
            running=seen.count("stub_running"),
            waiting=seen.count("stub_waiting"),
            kv_usage=seen.max_value("stub_cache_share"),
            kv_capacity_tokens=window * lanes or None,
            prompt_tokens=seen.total("stub_prompt_tokens"),
            generation_tokens=seen.total("stub_text_tokens"),
            prompt_s=seen.total("stub_prompt_seconds"),
            generation_s=seen.total("stub_text_seconds"),
        )

    def locks_model(self, argv: Sequence[str]) -> bool:
        """See Engine."""
        return False

    def reduces_kv_cache(self, argv: Sequence[str]) -> bool:
        """See Engine."""
        return option_in_argv(argv, "cache-format") == "half"

    def is_quantization(self, method: str, reported: str) -> bool:
        """See Engine."""
        return method == reported

    def log_reader(self) -> LogReader:
        """See Engine."""
        return _SpeedReader(self.name, "GPU" if self.gpu_by_default else "CPU")


class _SpeedReader:
    """See LogReader."""

    def __init__(self, engine: str, place: Literal["GPU", "CPU"]) -> None:
        self._engine, self._place = engine, place
        self._windows: list[LogWindow] = []
        self._lines = 0

    def feed(self, line: str) -> None:
        """See LogReader."""
        if not _OWN.match(line):
            return
        self._lines += 1
        if match := _SPEED.match(line):
            at_s, prompt, text, running, waiting, cache = match.groups()
            self._windows.append(
                LogWindow(
                    at_s=float(at_s),
                    seconds=10.0,
                    prompt_tok_s=float(prompt),
                    generation_tok_s=float(text),
                    running=int(running),
                    waiting=int(waiting),
                    kv_usage=float(cache) / 100,
                )
            )

    def samples(self) -> LogSamples:
        """See LogReader."""
        return LogSamples(
            engine=self._engine,
            known_lines=self._lines,
            windows=tuple(self._windows),
            place=self._place,
        )


@contextlib.contextmanager
def registered(*, gpu: bool) -> Iterator[StubEngine]:
    """Register the engine until the end of the context."""
    stub = StubEngine(gpu=gpu)
    engines.ENGINES[stub.name] = stub
    try:
        yield stub
    finally:
        del engines.ENGINES[stub.name]


def profile_text(*, gpu: bool, **more: object) -> str:
    """Return a profile of the engine as YAML."""
    name = "stub-gpu" if gpu else "stub-cpu"
    values = {"engine": name, "stack": name, "context": 2048, **more}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


if __name__ == "__main__":
    from stackctl.cli.main import run

    with registered(gpu=True), registered(gpu=False):
        sys.exit(run(sys.argv[1:]))
