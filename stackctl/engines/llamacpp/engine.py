"""llama.cpp's llama-server: its dialects, log and failures.

Flags and defaults were read from the engine's own help (builds b11434 to b11669).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stackctl.engines.llamacpp import image, log, memory, metrics, models, options
from stackctl.engines.options import Dialect, Option, int_option_in_argv, option, option_in_argv
from stackctl.engines.protocol import (
    CACHE,
    LIBRARY_VARIABLES,
    Advice,
    Engine,
    EngineRequest,
    Footprint,
)
from stackctl.values.diagnosis import Step
from stackctl.values.engine_facts import EngineOption, MeasuredMemory
from stackctl.values.generation import EngineFact
from stackctl.values.model import Model

#: Types of a KV cache of 8 bits or fewer begin with these: q8_0, q4_1, iq4_nl.
_FEW_BITS = ("q", "iq")
_NAMES = re.compile(r"-{1,2}[A-Za-z0-9][\w-]*(?:,\s+-{1,2}[A-Za-z0-9][\w-]*)*")

#: The planned options, as the newest builds spell them.
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


class LlamaCpp(Engine):
    """See Engine."""

    name = "llama.cpp"
    title = "llama.cpp"
    default_image = "ghcr.io/ggml-org/llama.cpp:server"
    local_image = image.LOCAL_IMAGE
    image_recipes = image.RECIPES
    model_format = "gguf"
    trial_profiles = ("gpu-gguf", "hybrid-moe", "cpu")
    restart = "on-failure"
    # A warm-up run; on GPUs the driver may also compile kernels.
    start_s = 120
    compiles = "on GPUs"
    gpu_by_default = False
    splits_experts = True
    program = "llama-server"
    published_entrypoint = ("/app/llama-server",)
    help_arguments = ("--help",)
    reserved_options: Mapping[str, str] = {
        "host": "stackctl serves on 127.0.0.1 only",
        "port": "use the key port",
        "model": "use the key model",
        "alias": "use the key served_name",
        "api-key": "a secret must not be on a command line",
        "hf-token": "a secret must not be on a command line",
    }
    newest = Dialect(_NEWEST, inspected=False)
    metrics_paths = ("/metrics", "/slots")
    reports = (
        ("build", "/props", ("build_info",)),
        ("context", "/props", ("default_generation_settings", "n_ctx")),
        ("slots", "/props", ("total_slots",)),
        ("model_path", "/props", ("model_path",)),
    )
    context_option = "ctx-size"
    requests_option = "parallel"
    shares_context = True
    threads_options = ("threads", "threads-batch")
    kv_types = ("q8_0", "q4_0")
    advice = Advice(
        use_gpu=Step(
            do="use a GPU, if there is one, with llama.cpp too (--n-gpu-layers 999)",
            command="stackctl up gpu-gguf",
        ),
        large_batches={"batch-size": 2048, "ubatch-size": 2048},
        small_batches="--batch-size 512 --ubatch-size 128",
        cached_tokens_option=None,
        log_mark="print_timing",
    )
    environment_prefixes = ("LLAMA_", "GGML_", *LIBRARY_VARIABLES)
    calibration = metrics.BENCHMARK

    cannot_run = staticmethod(models.cannot_run)
    plan_options = staticmethod(options.plan_options)
    kv_token_bytes = staticmethod(memory.kv_token_bytes)
    weights_read_on_cpu = staticmethod(memory.weights_read_on_cpu)
    phase = staticmethod(log.phase)
    failure = staticmethod(log.failure)
    facts_from_log = staticmethod(log.facts_from_log)
    parse_metrics = staticmethod(metrics.parse_metrics)
    log_reader = staticmethod(metrics.RequestReader)

    def tokenize_request(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:  # noqa: ARG002
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

    def environment(self, request: EngineRequest) -> tuple[str, ...]:
        """See Engine. If the image lacks kernels for a GPU, the driver compiles and caches them."""
        return (f"CUDA_CACHE_PATH={CACHE}/cuda",) if request.gpus else ()

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: MeasuredMemory | None = None,  # noqa: ARG002
    ) -> Footprint:
        """See Engine."""
        return memory.footprint(model, options, on_gpu=gpu_bytes > 0)

    def render_option(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
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
            # Builds before 2025-08 had a switch without a value, off by default.
            return (flag,) if option.value == "on" else ()
        if not option.values:
            return (flag,)
        return tuple(token for value in option.values for token in (flag, _text(value)))

    def expected_facts(self, argv: Sequence[str]) -> tuple[EngineFact, ...]:
        """See Engine. Without a shared KV cache each slot has its part of the context. Values that
        the engine chooses itself (--parallel -1, --ctx-size 0) are left out."""
        slots, context = (int_option_in_argv(argv, name) for name in ("parallel", "ctx-size"))
        if slots and context and "--kv-unified" not in argv:
            context //= slots
        told = (
            ("context", context),
            ("slots", slots),
            ("model_path", option_in_argv(argv, "model")),
        )
        return tuple(EngineFact(name=name, value=str(value)) for name, value in told if value)

    def locks_model(self, argv: Sequence[str]) -> bool:
        """See Engine: --load-mode, or --mlock of older builds."""
        return "--mlock" in argv or "mlock" in (option_in_argv(argv, "load-mode") or "")

    def reduces_kv_cache(self, argv: Sequence[str]) -> bool:
        """See Engine."""
        return (option_in_argv(argv, "cache-type-k") or "").startswith(_FEW_BITS)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _old_load_mode(mode: str, dialect: Dialect) -> tuple[str, ...] | None:
    """Return the arguments for builds before --load-mode (2026), whose default is mmap.

    None if the build lacks one of them.
    """
    flags = {"auto": (), "mmap": (), "mmap+mlock": ("mlock",), "mlock": ("no-mmap", "mlock"),
             "none": ("no-mmap",), "dio": ("direct-io",)}.get(mode)  # fmt: skip
    if flags is None or any(dialect.find(flag) is None for flag in flags):
        return None
    return tuple(f"--{flag}" for flag in flags)
