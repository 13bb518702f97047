"""llama.cpp's llama-server: its dialects, log and failures.

Flags and defaults were read from the engine's own help (builds b11434 to b11669).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from stackctl.engines.engine import (
    CACHE,
    Dialect,
    Failure,
    Footprint,
    LogReader,
    Option,
    Reports,
    Request,
    argument,
    failure_table,
    first_match,
    option,
    whole_argument,
)
from stackctl.engines.llamacpp_metrics import RequestReader, measure
from stackctl.engines.llamacpp_options import choose, footprint
from stackctl.values.generation import Fact
from stackctl.values.measured import EngineOption, Seen
from stackctl.values.model import Model

_NAMES = re.compile(r"-{1,2}[A-Za-z0-9][\w-]*(?:,\s+-{1,2}[A-Za-z0-9][\w-]*)*")


#: The options planned here as the newest builds spell them.
_NEWEST = (
    option("model", "FNAME"), option("alias", "STRING"), option("host", "HOST"),
    option("port", "PORT"), option("ctx-size", "N"), option("parallel", "N"),
    option("kv-unified no-kv-unified"), option("threads", "N"), option("threads-batch", "N"),
    option("batch-size", "N"), option("ubatch-size", "N"), option("flash-attn", "[on|off|auto]"),
    option("load-mode", "MODE"), option("numa", "TYPE"), option("cache-reuse", "N"),
    option("cache-ram", "N"), option("cache-type-k", "TYPE"), option("cache-type-v", "TYPE"),
    option("jinja no-jinja"), option("metrics"), option("cors-origins", "ORIGINS"),
    option("gpu-layers n-gpu-layers", "N"), option("n-cpu-moe", "N"),
)  # fmt: skip

#: Causes of a failed start, most specific first. Checked against the last lines of the log.
_FAILURES = failure_table(
    (
        r"setrlimit `?RLIMIT_MEMLOCK`?: Operation not permitted",
        "this machine does not let the container raise its locked-memory limit",
        "--set engine_args.load-mode=mmap",
    ),
    (
        r"unknown model architecture: '(?P<name>[^']*)'",
        "this image does not know the model's architecture {name}",
        "a newer image: --set image=...",
    ),
    (
        r"error: (invalid|unknown) argument: (?P<name>\S+)",
        "this image's llama-server has no option {name}",
        "remove it from engine_args, or use another image",
    ),
    (
        r"error while handling argument \"(?P<name>[^\"]+)\": (?P<why>.*)",
        "llama-server refuses the value of {name}: {why}",
        "correct it in engine_args",
    ),
    (
        r"tensor '(?P<name>[^']*)' data is not within the file bounds|read error: unexpectedly "
        r"reached end of file|failed to read (magic|tensor|key)",
        "the model file is damaged or incomplete",
        "compare its size and checksum with the source, and copy it again",
    ),
    (
        r"(couldn't bind|failed to bind|bind HTTP server socket)",
        "the port is taken by another process",
        "stackctl down, or another port: --set port=N",
    ),
    (
        r"(failed to open GGUF file|gguf_init_from_file).*(Permission denied)|"
        r"open.*\.gguf.*Permission denied",
        "the engine may not read the model file",
        "chmod a+r on the file and a+x on the folders above it",
    ),
    (
        r"^(?!.*mlock).*((unable|failed) to allocate|cannot allocate|std::bad_alloc)",
        "not enough memory",
        "a smaller context: --set context=N, or a smaller model",
    ),
    (
        r"(executable file [`'\"]?(?P<name>\S+?)[`'\"]? not found|no such file or directory"
        r".*llama-server)",
        "the image holds no llama-server",
        "stackctl image build llama-cpp, or another image: --set image=...",
    ),
    (r"error loading model: (?P<why>.*)", "llama-server cannot load the model: {why}", None),
    (r"illegal instruction", "the image was built for a newer CPU than this one",
     "stackctl image build llama-cpp makes one that picks its code at run time"),
)  # fmt: skip

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"listening on http|server is listening"), "answering"),
    (re.compile(r"model loaded"), "model loaded"),
    (re.compile(r"warming up"), "warming up"),
    (re.compile(r"loading model|load_tensors|load_model"), "loading model"),
)

#: Of the log of a start: why the model is not locked, and the threads that compute.
_SAID = (
    ("mlock", re.compile(r"(failed to mlock .*)")),
    ("threads", re.compile(r"threadpool init, n_threads = (\d+)")),
)


class LlamaCpp:
    """See Engine."""

    name = "llama.cpp"
    default_image = "ghcr.io/ggml-org/llama.cpp:server"
    local_image = "localhost/stackctl/llama-cpp:latest"
    cpu_image: str | None = None
    shm_bytes: int | None = None
    restart: Literal["on-failure", "always"] = "on-failure"
    compiles: Literal["everywhere", "on GPUs"] = "on GPUs"
    overriding: tuple[str, ...] = ()
    program = "llama-server"
    published_entrypoint: tuple[str, ...] = ("/app/llama-server",)
    help_arguments: tuple[str, ...] = ("--help",)
    reserved: Mapping[str, str] = {
        "host": "stackctl serves on 127.0.0.1 only",
        "port": "use the key port",
        "model": "use the key model",
        "alias": "use the key served_name",
        "api-key": "a secret must not be on a command line",
        "hf-token": "a secret must not be on a command line",
    }
    newest = Dialect(_NEWEST, inspected=False)
    health_path = "/health"
    running_metrics: tuple[str, ...] = (
        "llamacpp:requests_processing",
        "llamacpp:requests_deferred",
    )
    metrics_paths: tuple[str, ...] = ("/metrics", "/slots")
    reports: Reports = (
        ("build", "/props", ("build_info",)),
        ("context", "/props", ("default_generation_settings", "n_ctx")),
        ("slots", "/props", ("total_slots",)),
        ("model_path", "/props", ("model_path",)),
    )
    context_option = "ctx-size"
    requests_option = "parallel"
    shares_context = True

    def tokenizing(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:  # noqa: ARG002
        """See Engine."""
        return "/tokenize", {"content": text, "add_special": False}

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """See Engine: an entry starts in the first column; two spaces end its value."""
        found = []
        for line in text.splitlines():
            match = _NAMES.match(line)
            if match is None:
                continue
            names = tuple(re.split(r",\s+", match.group()))
            rest = line[match.end() :]
            value = None
            if re.match(r" \S", rest):
                value = re.split(r"\s{2,}", rest.strip())[0]
            found.append(EngineOption(names=names, value=value))
        return tuple(found)

    def parse_version(self, text: str) -> str | None:
        """See Engine."""
        match = re.search(r"^version: (.+)", text, re.MULTILINE)
        return match[1] if match else None

    def choose(self, request: Request) -> tuple[Option, ...]:
        """See Engine."""
        return choose(request)

    def environment(self, request: Request) -> tuple[str, ...]:
        """See Engine. For a GPU that an image has no kernels for, the driver compiles them."""
        return (f"CUDA_CACHE_PATH={CACHE}/cuda",) if request.gpus else ()

    def recall(
        self,
        seen: Sequence[Seen],  # noqa: ARG002
        argv: Sequence[str],  # noqa: ARG002
        options: Mapping[str, Option],
    ) -> tuple[Seen | None, dict[str, Option]]:
        """See Engine: it tells no sizes."""
        return None, dict(options)

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: Seen | None = None,  # noqa: ARG002
    ) -> Footprint:
        """See Engine."""
        return footprint(model, options, on_gpu=gpu_bytes > 0)

    def spell(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """See Engine."""
        if option.values is None:
            return ()
        known = dialect.find(option.name)
        if option.name == "load-mode" and known is None:
            return _old_load_mode(str(option.value), dialect)
        if known is None:
            return None
        flag = f"--{option.name}"
        if option.name == "flash-attn" and known.value is None:
            # Builds before 2025-08 had a bare switch, off by default.
            return (flag,) if option.value == "on" else ()
        if not option.values:
            return (flag,)
        return tuple(token for value in option.values for token in (flag, _text(value)))

    def phase(self, line: str) -> str | None:
        """See Engine."""
        return next((name for pattern, name in _PHASES if pattern.search(line)), None)

    def failure(self, lines: Sequence[str]) -> Failure | None:
        """See Engine."""
        return first_match(lines, _FAILURES)

    def dead(self, lines: Sequence[str]) -> bool:  # noqa: ARG002
        """See Engine: it is one process."""
        return False

    def said(self, lines: Sequence[str]) -> tuple[Fact, ...]:
        """See Engine: the rest is asked over HTTP; its log names no sizes by default."""
        found = ((name, pattern.search(line)) for line in lines for name, pattern in _SAID)
        return tuple({n: Fact(name=n, value=match[1]) for n, match in found if match}.values())

    def promised(self, argv: Sequence[str]) -> tuple[Fact, ...]:
        """See Engine. Without a shared KV cache each slot has its part of the context. What it
        chooses itself (--parallel -1, --ctx-size 0) is no promise."""
        slots, context = (whole_argument(argv, name) for name in ("parallel", "ctx-size"))
        if slots and context and "--kv-unified" not in argv:
            context //= slots
        told = (("context", context), ("slots", slots), ("model_path", argument(argv, "model")))
        return tuple(Fact(name=name, value=str(value)) for name, value in told if value)

    measure = staticmethod(measure)

    def log_reader(self) -> LogReader:
        """See Engine."""
        return RequestReader()


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _old_load_mode(mode: str, dialect: Dialect) -> tuple[str, ...] | None:
    """Before --load-mode (2026): mmap by default, --mlock and --no-mmap to change it."""
    flags = {"auto": (), "mmap": (), "mmap+mlock": ("mlock",), "mlock": ("no-mmap", "mlock"),
             "none": ("no-mmap",), "dio": ("direct-io",)}.get(mode)  # fmt: skip
    if flags is None or any(dialect.find(flag) is None for flag in flags):
        return None
    return tuple(f"--{flag}" for flag in flags)
