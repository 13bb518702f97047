"""vLLM on GPUs and on a CPU (vllm serve, 0.32 and later; flags from its own --help)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stackctl.engines.options import Dialect, Option, option, option_in_argv
from stackctl.engines.protocol import (
    CACHE,
    LIBRARY_VARIABLES,
    Advice,
    Engine,
    EngineRequest,
)
from stackctl.engines.vllm import image, log, memory, metrics, models, options
from stackctl.errors import StackctlError
from stackctl.quantity import parse_tokens
from stackctl.values.diagnosis import Step
from stackctl.values.engine_facts import EngineOption
from stackctl.values.generation import EngineFact
from stackctl.values.model import Model

_GIB = 2**30
#: Methods whose names in vLLM's log do not begin with the method.
_ALSO_CALLED = {"compressed-tensors": "compressed"}

_ENTRY = re.compile(r"^  (-[\w-]+(?:,? .*)?)$")
_NAME = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")

_NEWEST = (
    option("served-model-name", "NAME"), option("host", "HOST"), option("port", "PORT"),
    option("max-model-len", "N"), option("max-num-seqs", "N"),
    option("max-num-batched-tokens", "N"), option("gpu-memory-utilization", "F"),
    option("performance-mode", "MODE"), option("kv-cache-dtype", "TYPE"),
    option("tensor-parallel-size", "N"), option("generation-config", "NAME"),
    option("quantization", "NAME"), option("linear-backend", "NAME"),
    option("moe-backend", "NAME"), option("trust-remote-code no-trust-remote-code"),
    option("enable-prefix-caching no-enable-prefix-caching"),
    option("kv-cache-memory-bytes", "N"),
    option("enable-prompt-tokens-details no-enable-prompt-tokens-details"),
)  # fmt: skip


class Vllm(Engine):
    """See Engine."""

    name = "vllm"
    title = "vLLM"
    default_image = "docker.io/vllm/vllm-openai:latest"
    local_image = "localhost/stackctl/vllm:latest"
    cpu_image = image.CPU_IMAGE
    image_recipes = image.RECIPES
    model_format = "safetensors"
    trial_profiles = ("gpu-nvfp4", "cpu-vllm")
    # An upper limit: only written pages take memory. One worker had two segments of 160 and 240 MiB
    # (0.32); each further GPU adds its own. The host's /dev/shm (--ipc=host) would expose more.
    shm_bytes = 8 * _GIB
    # The API server ends with status 0 if the engine core has died.
    restart = "always"
    # It also compiles the model and captures CUDA graphs.
    start_s = 600
    compiles = "everywhere"
    # "Legacy setting" (0.32, platforms/cpu.py): it overrides --kv-cache-memory-bytes. An empty
    # value does not, but then envs.py, which reads all variables, fails.
    conflicting_env = ("VLLM_CPU_KVCACHE_SPACE",)
    gpu_by_default = True
    # A worker binds its memory to the node of its first CPU, and refuses a KV cache that is larger
    # than the node (0.32, cpu_worker.py).
    one_node_on_cpu = True
    program = "vllm"
    published_entrypoint = ("vllm", "serve")
    # Without "all" the help lists only groups of options.
    help_arguments = ("serve", "--help=all")
    reserved_options: Mapping[str, str] = {
        "host": "stackctl serves on 127.0.0.1 only",
        "port": "use the key port",
        "model": "use the key model",
        "served-model-name": "use the key served_name",
        "api-key": "a secret must not be on a command line",
        "hf-token": "a secret must not be on a command line",
        "trust-remote-code": "use the key trust_remote_code, which wants a commit",
    }
    newest = Dialect(_NEWEST, inspected=False)
    metrics_paths = ("/metrics",)
    reports = (
        ("version", "/version", ("version",)),
        ("context", "/v1/models", ("data", 0, "max_model_len")),
    )
    context_option = "max-model-len"
    requests_option = "max-num-seqs"
    kv_types = ("fp8",)
    # vLLM accepts any number of requests, which wait until the cache has room.
    requests_share_cache = True
    advice = Advice(
        use_gpu=Step(do="use a GPU, if there is one", command="stackctl up gpu-nvfp4"),
        large_batches={"max-num-batched-tokens": 16384},
        small_batches=None,
        cached_tokens_option="enable-prompt-tokens-details",
        log_mark="Avg generation throughput",
    )
    environment_prefixes = ("VLLM_", "TORCH", *LIBRARY_VARIABLES)
    logs_kv_cache = True
    calibration = metrics.COUNTERS

    cannot_run = staticmethod(models.cannot_run)
    fallback_kernels = staticmethod(models.fallback_kernels)
    plan_options = staticmethod(options.plan_options)
    footprint = staticmethod(memory.footprint)
    apply_measured_memory = staticmethod(memory.apply_measured_memory)
    phase = staticmethod(log.phase)
    failure = staticmethod(log.failure)
    has_crashed = staticmethod(log.has_crashed)
    facts_from_log = staticmethod(log.facts_from_log)
    parse_metrics = staticmethod(metrics.parse_metrics)
    log_reader = staticmethod(metrics.WindowReader)

    def usable_gpus(self, count: int) -> tuple[int, str]:
        """See Engine. Attention heads are split evenly: their number is rarely a multiple of 3 or
        5."""
        even = 2 ** (count.bit_length() - 1) if count else 0
        return even, f"of {count} GPUs as many as divide the heads" if even < count else ""

    def kv_token_bytes(self, model: Model, options: Mapping[str, Option], gpus: int) -> float:
        """See Engine."""
        return memory.kv_token_bytes(model, memory.kv_type(options), max(1, gpus))

    def tokenize_request(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:
        """See Engine."""
        return "/tokenize", {"model": served_name, "prompt": text, "add_special_tokens": False}

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """See Engine: an entry starts in the third column with its names."""
        found = []
        for line in text.splitlines():
            if not (match := _ENTRY.match(line)):
                continue
            head = re.split(r"\s{2,}", match[1])[0]
            names = tuple(_NAME.findall(re.sub(r"\{[^}]*\}", "", head)))
            value = re.sub(r"(?<![\w-])--?[a-zA-Z][\w-]*,?", "", head).split()
            if names:
                found.append(
                    EngineOption(names=names, value=value[0].rstrip(",") if value else None)
                )
        return tuple(found)

    def parse_version(self, text: str) -> str | None:
        """See Engine."""
        match = re.search(r"\d+\.\d+\.\d+\S*", text)
        return match[0] if match else None

    def environment(self, request: EngineRequest) -> tuple[str, ...]:
        """See Engine. vLLM downloads and reports nothing, and compiles into one folder."""
        texts = (
            f"HOME={CACHE}",
            f"XDG_CACHE_HOME={CACHE}",
            f"VLLM_CACHE_ROOT={CACHE}/vllm",
            f"TORCHINDUCTOR_CACHE_DIR={CACHE}/inductor",
            f"TRITON_CACHE_DIR={CACHE}/triton",
            f"FLASHINFER_WORKSPACE_BASE={CACHE}",
            "HF_HUB_OFFLINE=1",
            "TRANSFORMERS_OFFLINE=1",
            "VLLM_NO_USAGE_STATS=1",
            "DO_NOT_TRACK=1",
        )
        if request.gpus or request.placement.cpus is None:
            return texts
        # By default vLLM leaves one of the planned CPUs idle.
        return (*texts, f"VLLM_CPU_OMP_THREADS_BIND={request.placement.cpus}")

    def render_option(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """See Engine."""
        if option.values is None:
            return ()
        if option.name == "model":
            return ("serve", str(option.value))
        if dialect.find(option.name) is None:
            return None
        flag = f"--{option.name}"
        return (flag, *(str(value) for value in option.values))

    def reduces_kv_cache(self, argv: Sequence[str]) -> bool:
        """See Engine: fp8, fp8_e4m3, fp8_e5m2."""
        return (option_in_argv(argv, "kv-cache-dtype") or "").startswith("fp8")

    def is_quantization(self, method: str, reported: str) -> bool:
        """See Engine: "modelopt" is reported as "modelopt_fp4", "awq" as "awq_marlin"."""
        return reported.lower().startswith(_ALSO_CALLED.get(method, method))

    def expected_facts(self, argv: Sequence[str]) -> tuple[EngineFact, ...]:
        """See Engine. A context that the engine chooses itself (auto, -1) is left out; 32K is 32768
        tokens."""
        try:
            context = parse_tokens(option_in_argv(argv, "max-model-len") or "")
        except StackctlError:
            return ()
        return (EngineFact(name="context", value=str(context)),) if context else ()
