"""vLLM on GPUs and on a CPU (vllm serve, 0.32 and later; flags from its own --help)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from stackctl.engines import mounts, vllm_log, vllm_metrics, vllm_seen
from stackctl.engines.engine import (
    CACHE,
    Dialect,
    Footprint,
    LogReader,
    Option,
    Reports,
    Request,
    argument,
    number,
    option,
    origin,
)
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes, parse_tokens
from stackctl.values.generation import Fact
from stackctl.values.measured import EngineOption, Seen
from stackctl.values.model import Model

_GIB = 2**30
_DEFAULT_CONTEXT = 32768
#: vLLM's own default for --gpu-memory-utilization; the rest holds what it does not account for.
_USUAL_UTILIZATION = 0.92
#: vLLM besides weights and KV cache: CUDA graphs and context, and activations of one batch (about
#: 54 B an element of the residual stream). A first guess until the engine's own log replaces it.
_ENGINE_BYTES = 2 * _GIB
_ACTIVATION_BYTES = 54
#: Main memory of the API server and the worker.
_HOST_BYTES = 6 * _GIB
#: On a CPU: API server, engine and worker were 1.6 GB resident besides weights and KV cache (0.32).
_CPU_ENGINE_BYTES = 2 * _GIB
#: Bytes an element of a KV cache type; what is not named has 16 bits.
KV_TYPE_BYTES = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "nvfp4": 0.5625}

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


class Vllm:
    """See Engine."""

    name = "vllm"
    default_image = "docker.io/vllm/vllm-openai:latest"
    local_image = "localhost/stackctl/vllm:latest"
    cpu_image: str | None = "localhost/stackctl/vllm-cpu:latest"
    # A ceiling: only what is written counts. Two segments of 160 and 240 MiB were seen for one
    # worker (0.32); each further GPU adds its own. The host's own (--ipc=host) would show more.
    shm_bytes: int | None = 8 * _GIB
    # It ends in good order, with status 0, when what computes in it has died.
    restart: Literal["on-failure", "always"] = "always"
    compiles: Literal["everywhere", "on GPUs"] = "everywhere"
    # "Legacy setting" (0.32, platforms/cpu.py): it wins over --kv-cache-memory-bytes. Set and empty
    # it does not, but envs.py, which reads all variables, then fails.
    overriding: tuple[str, ...] = ("VLLM_CPU_KVCACHE_SPACE",)
    program = "vllm"
    published_entrypoint: tuple[str, ...] = ("vllm", "serve")
    # Without "all" it names groups of options only.
    help_arguments: tuple[str, ...] = ("serve", "--help=all")
    reserved: Mapping[str, str] = {
        "host": "stackctl serves on 127.0.0.1 only",
        "port": "use the key port",
        "model": "use the key model",
        "served-model-name": "use the key served_name",
        "api-key": "a secret must not be on a command line",
        "hf-token": "a secret must not be on a command line",
        "trust-remote-code": "use the key trust_remote_code, which wants a commit",
    }
    newest = Dialect(_NEWEST, inspected=False)
    health_path = "/health"
    running_metrics: tuple[str, ...] = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    metrics_paths: tuple[str, ...] = ("/metrics",)
    reports: Reports = (
        ("version", "/version", ("version",)),
        ("context", "/v1/models", ("data", 0, "max_model_len")),
    )
    context_option = "max-model-len"
    requests_option = "max-num-seqs"
    shares_context = False

    def tokenizing(self, text: str, served_name: str) -> tuple[str, Mapping[str, object]]:
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

    def choose(self, request: Request) -> tuple[Option, ...]:
        """See Engine."""
        profile, latency = request.profile, request.profile.objective == "latency"
        context, why_context = _context(request)
        seqs, why_seqs = _sequences(request)
        on_cpu = not request.gpus
        batched = (2048 if latency else 4096) if on_cpu else (8192 if latency else 16384)
        kv_type = profile.kv_type or "auto"
        options = [
            Option("model", (request.model_path,), "the model"),
            _names(request),
            Option("host", ("127.0.0.1",), "loopback only"),
            request.port_option,
            Option("max-model-len", (context,), why_context, origin(request, "context")),
            Option("max-num-seqs", (seqs,), why_seqs, origin(request, "concurrency")),
            Option(
                "max-num-batched-tokens",
                (batched,),
                "latency: short steps keep tokens coming; given up: prompt speed of many at once"
                if latency
                else "throughput: more prompt tokens a step; given up: steady answers meanwhile",
            ),
            Option(
                "performance-mode",
                ("interactivity" if latency else "throughput",),
                "latency objective: fast steps for few requests"
                if latency
                else "throughput objective: large steps for many requests",
            ),
        ]
        if kv_type != "auto":
            options.append(
                Option("kv-cache-dtype", (kv_type,), "profile", origin(request, "kv_type"))
            )
        options.append(
            _cpu_cache(request, context, seqs, kv_type)
            if on_cpu
            else self._utilization(request, context, batched, kv_type)
        )
        options.append(
            Option("enable-prefix-caching", (), "a prompt's known beginning is not computed again")
        )
        options.append(
            Option("enable-prompt-tokens-details", (), "answers tell what of it was in the cache")
        )
        quantized = request.model.quantization_method
        options.append(
            Option(
                "quantization",
                None,
                f"in the checkpoint: {quantized}" if quantized else "read from the checkpoint",
            )
        )
        if len(request.gpus) > 1:
            reason = "each weight is split over the GPUs"
            options.append(Option("tensor-parallel-size", (len(request.gpus),), reason))
        if request.profile.trust_remote_code:
            options.append(_remote_code(request))
        options.append(
            Option(
                "generation-config",
                ("vllm",),
                "clients choose the sampling; given up: the checkpoint's defaults",
            )
        )
        return tuple(options)

    def environment(self, request: Request) -> tuple[str, ...]:
        """See Engine. Nothing is fetched or reported; all that is compiled lies in one place."""
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
        # Left to itself it keeps a CPU of its own free, of those that the plan chose.
        return (*texts, f"VLLM_CPU_OMP_THREADS_BIND={request.placement.cpus}")

    recall = staticmethod(vllm_seen.recall)

    def footprint(
        self,
        model: Model,
        options: Mapping[str, Option],
        gpu_bytes: int,
        seen: Seen | None = None,
    ) -> Footprint:
        """See Engine. The KV cache takes all that the utilisation leaves on every GPU; what weights
        and KV cache were seen to leave of it is the engine's own."""
        context = number(options, "max-model-len", model.context or _DEFAULT_CONTEXT)
        batched = number(options, "max-num-batched-tokens", 8192)
        gpus = number(options, "tensor-parallel-size", 1)
        told = seen.weights_bytes if seen else None
        weights = model.weights_bytes if told is None else told * gpus
        if not gpu_bytes:
            return Footprint(
                weights_bytes=weights,
                kv_bytes=number(options, "kv-cache-memory-bytes", 0),
                compute_bytes=_engine_bytes(model, batched, _CPU_ENGINE_BYTES),
            )
        kv_type = str(options["kv-cache-dtype"].value) if "kv-cache-dtype" in options else "auto"
        engine = _engine_bytes(model, batched)
        needed = round(kv_token_bytes(model, kv_type, gpus) * context)
        share = options["gpu-memory-utilization"].value if options else None
        total = round(float(share) * gpu_bytes) if isinstance(share, float | int) else 0
        host = Footprint(weights_bytes=0, kv_bytes=0, compute_bytes=_HOST_BYTES)
        if seen is not None and told is not None and seen.kv_bytes is not None:
            return Footprint(
                weights_bytes=weights,
                kv_bytes=seen.kv_bytes * gpus,
                compute_bytes=max(0, total - told - seen.kv_bytes),
                host=host,
                measured=True,
            )
        spare = (total - engine) * gpus - weights
        return Footprint(
            weights_bytes=weights,
            kv_bytes=max(needed, spare),
            compute_bytes=engine,
            host=host,
        )

    def spell(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """See Engine."""
        if option.values is None:
            return ()
        if option.name == "model":
            return ("serve", str(option.value))
        if dialect.find(option.name) is None:
            return None
        flag = f"--{option.name}"
        return (flag, *(str(value) for value in option.values))

    phase = staticmethod(vllm_log.phase)
    failure = staticmethod(vllm_log.failure)
    dead = staticmethod(vllm_log.dead)
    said = staticmethod(vllm_log.said)
    measure = staticmethod(vllm_metrics.measure)

    def log_reader(self) -> LogReader:
        """See Engine."""
        return vllm_metrics.WindowReader()

    def promised(self, argv: Sequence[str]) -> tuple[Fact, ...]:
        """See Engine. What it chooses itself (auto, -1) is no promise; 32K is 32768 tokens."""
        try:
            context = parse_tokens(argument(argv, "max-model-len") or "")
        except StackctlError:
            return ()
        return (Fact(name="context", value=str(context)),) if context else ()

    def _utilization(self, request: Request, context: int, batched: int, kv_type: str) -> Option:
        """As high as the reserve and other stacks allow: spare memory is prefix cache."""
        total, limit = request.gpu_bytes, request.gpu_limit_bytes
        if not total or limit is None:
            return Option("gpu-memory-utilization", (_USUAL_UTILIZATION,), "GPU memory unknown")
        gpus = max(1, len(request.gpus))
        per_token = kv_token_bytes(request.model, kv_type, gpus) / gpus
        fixed = request.model.weights_bytes / gpus + _engine_bytes(request.model, batched)
        needed = fixed + per_token * context
        share = min(
            limit / total, max(_USUAL_UTILIZATION, math.ceil(needed / total * 10000) / 10000)
        )
        # Two digits, unless the context needs what they would cut off.
        coarse = math.floor(share * 100) / 100
        share = coarse if coarse * total >= needed else math.floor(share * 10000) / 10000
        share = max(0.01, share)
        others = format_bytes(request.gpu_claimed_bytes) + " left to other stacks"
        reason = (
            f"{format_bytes(request.profile.gpu_reserve_bytes)} kept free, "
            f"{others if request.gpu_claimed_bytes else 'no other stack on the GPU'}"
        )
        if per_token:
            spare = max(0, round((share * total - fixed) / per_token))
            reason += f"; spare KV ({spare:,} tokens) is prefix cache"
        return Option("gpu-memory-utilization", (share,), reason)


def kv_token_bytes(model: Model, kv_type: str = "auto", gpus: int = 1) -> float:
    """Bytes of the KV cache for one token of a full context, on all GPUs together.

    KV heads are split over the GPUs; where there are fewer of them (one, of latent attention), each
    GPU keeps a copy.

    All layers count in full: vLLM's hybrid allocator saves on sliding windows, but not for every
    model, so this is an upper bound.
    """
    if model.kv is None:
        return 0.0
    element = KV_TYPE_BYTES.get(kv_type, 2.0)
    layout = model.kv
    heads = sum(-(-count // gpus) * gpus for count in layout.kv_heads)
    return heads * (layout.key_dim + layout.value_dim) * element * model.passes


def _cpu_cache(request: Request, context: int, seqs: int, kv_type: str) -> Option:
    """All requests at their whole context at once, at least 1 GiB."""
    wanted = round(kv_token_bytes(request.model, kv_type) * context * seqs)
    size = max(_GIB, -(-wanted // _GIB) * _GIB)
    many = f"{seqs} requests" if seqs > 1 else "one request"
    reason = f"{many} of {context:,} tokens, in whole GiB; spare room is prefix cache"
    return Option("kv-cache-memory-bytes", (size,), reason)


def _names(request: Request) -> Option:
    others = request.profile.other_names
    reason = "the name clients ask for"
    if others:
        reason = f"answers give it as {request.served_name}; clients may ask for any of them"
    return Option("served-model-name", (request.served_name, *others), reason)


def _remote_code(request: Request) -> Option:
    """Raises StackctlError (exit 2) for code that nothing holds to one version."""
    commit = mounts.commit(request.model)
    if commit is None:
        raise StackctlError(
            f"trust_remote_code: nothing tells the commit of {request.model.source}",
            hint="a model from the hub's cache: --model hf:ORG/REPO@COMMIT",
            exit_code=ExitCode.USAGE,
        )
    return Option(
        "trust-remote-code",
        (),
        f"the profile trusts the code of commit {commit[:12]}",
        origin(request, "trust_remote_code"),
    )


def _engine_bytes(model: Model, batched: int, base: int = _ENGINE_BYTES) -> int:
    return base + batched * (model.embedding or 4096) * _ACTIVATION_BYTES


def _context(request: Request) -> tuple[int, str]:
    wanted, trained = request.profile.context, request.model.context
    if not isinstance(wanted, int):
        most = min(_DEFAULT_CONTEXT, trained or _DEFAULT_CONTEXT)
        return most, f"{kv_text(request)}"
    if trained is not None and wanted > trained:
        return trained, f"all the model was trained for; the profile asks for {wanted}"
    return wanted, f"profile; {kv_text(request)}"


def kv_text(request: Request) -> str:
    """What a token of context costs."""
    kind = request.profile.kv_type or "auto"
    return f"{format_bytes(round(kv_token_bytes(request.model, kind)))} a token"


def _sequences(request: Request) -> tuple[int, str]:
    wanted = request.profile.concurrency
    one = "one request at a time; given up: others wait"
    many = "decoding together reads the weights once; given up: the speed of one alone"
    if isinstance(wanted, int):
        return wanted, f"profile: {one if wanted == 1 else many}"
    if request.profile.objective == "latency":
        return 1, f"latency: {one}"
    return 64, f"throughput: {many}"
