"""Choice of llama.cpp's options.

Presets are those published for CPU use: small micro-batches for latency, large ones and several
slots for throughput; with layers on a GPU large ones for both.
"""

from __future__ import annotations

from stackctl.engines.llamacpp.memory import (
    CONTEXT_STEP,
    DEFAULT_CONTEXT,
    MOST_CACHE_MIB,
    footprint,
    padded_context,
)
from stackctl.engines.options import Option
from stackctl.engines.protocol import EngineRequest, Footprint, value_source
from stackctl.quantity import format_bytes
from stackctl.values.model import Model

_MIB = 2**20
_MOST_PROMPTS = 16


def plan_options(request: EngineRequest) -> tuple[Option, ...]:
    """Return the options for this machine, model and objective."""
    name = "the name clients ask for"
    if request.profile.other_names:
        name += "; it answers to every other as well"
    template = "the model's own chat template"
    if not request.model.chat_template:
        template = "the model has no chat template: a general one (ChatML) stands in"
    return (
        Option("model", (request.model_path,), "the model, mounted read-only"),
        Option("alias", (request.served_name,), name),
        Option("host", ("127.0.0.1",), "loopback only"),
        request.listen("port"),
        *_context(request),
        *_threads(request),
        *_batches(request),
        Option("flash-attn", ("on",), "less memory traffic for attention at no loss"),
        *_kv_types(request),
        *_offload(request),
        _load_mode(request),
        _numa(request),
        *_caches(request),
        Option("jinja", (), template),
        Option("cors-origins", ("localhost",), "no foreign web page may use it in a browser"),
        Option("metrics", (), "counters for health and measurement"),
    )


def _latency(request: EngineRequest) -> bool:
    return request.profile.objective == "latency"


def _context(request: EngineRequest) -> tuple[Option, ...]:
    slots, why = request.requests(throughput=4)
    each, reason = request.context(DEFAULT_CONTEXT)
    if reason is None:
        default = "" if isinstance(request.profile.context, int) else "default: "
        reason = f"{default}{each} tokens a request"
    if slots > 1:
        reason += f", {slots} requests"
    total = padded_context(each * slots)
    if total != each * slots:
        reason += f", padded to {CONTEXT_STEP}"
    options = (
        Option("ctx-size", (total,), reason, value_source(request, "context")),
        Option("parallel", (slots,), why, value_source(request, "concurrency")),
    )
    shared = "slots share one KV cache: a long prompt may use all; given up: a share for each"
    return (*options, Option("kv-unified", (), shared)) if slots > 1 else options


def _threads(request: EngineRequest) -> tuple[Option, ...]:
    if request.threads is None or request.threads_batch is None:
        reason = "cores unknown: the engine counts them itself"
        return (Option("threads", None, reason), Option("threads-batch", None, reason))
    (count, why), (batch, why_batch) = request.threads, request.threads_batch
    return (Option("threads", (count,), why), Option("threads-batch", (batch,), why_batch))


def _batches(request: EngineRequest) -> tuple[Option, ...]:
    if request.gpus:
        size = 2048 if _latency(request) or not request.model.experts else 4096
        reason = "a GPU takes long prompts in few steps"
        return (Option("batch-size", (size,), reason), Option("ubatch-size", (size,), reason))
    if _latency(request):
        sooner = "latency: on a CPU small micro-batches answer sooner; "
        return (
            Option("batch-size", (512,), "latency: prompts enter in small steps"),
            Option("ubatch-size", (128,), sooner + "given up: prompt speed of many at once"),
        )
    few = "throughput: long prompts in few steps; given up: steady answers meanwhile"
    return (
        Option("batch-size", (2048,), few),
        Option("ubatch-size", (2048,), "throughput: as large as the batch; given up: some memory"),
    )


def _kv_types(request: EngineRequest) -> tuple[Option, ...]:
    kind = request.profile.kv_type
    if kind is None or kind == "f16":
        return ()
    source = value_source(request, "kv_type")
    return tuple(
        Option(name, (kind,), "a smaller KV cache; given up: some exactness", source)
        for name in ("cache-type-k", "cache-type-v")
    )


def _offload(request: EngineRequest) -> tuple[Option, ...]:
    """Return the options that put layers on the GPU.

    If an MoE does not fit, the experts of its first layers stay in main memory.
    """
    if not request.gpus:
        return ()
    all_layers = Option("n-gpu-layers", (999,), "all layers on the GPU")
    wanted, model = request.profile.placement.cpu_experts, request.model
    if wanted is None or not model.experts:
        return (all_layers,)
    if isinstance(wanted, int):
        return (all_layers, Option("n-cpu-moe", (wanted,), "placement.cpu_experts", "profile"))
    for layers in range(model.layers + 1):
        parts = _memory(request, Option("n-cpu-moe", (layers,), ""), on_gpu=True)
        need = parts.weights_bytes + parts.kv_bytes + parts.compute_bytes
        if request.gpu_limit_bytes is None or need <= request.gpu_limit_bytes:
            break
    reason = f"experts of {layers} of {model.layers} layers stay in main memory: the rest fits"
    return (all_layers, Option("n-cpu-moe", (layers,), reason))


def _memory(request: EngineRequest, more: Option, *, on_gpu: bool) -> Footprint:
    """Return the memory that the engine takes with this option and those that are chosen."""
    chosen = (*_context(request), *_batches(request), *_kv_types(request), more)
    return footprint(request.model, {option.name: option for option in chosen}, on_gpu=on_gpu)


def _load_mode(request: EngineRequest) -> Option:
    limit = request.host.limits.memlock_bytes
    need = sum(file.bytes for file in request.model.files) or request.model.weights_bytes
    if request.gpus:
        # mlock would lock the whole file, also the part that lies on the GPU.
        reason = "not locked: weights go to the GPU"
    elif limit is None:
        reason = "not locked: the locked-memory limit of services is unknown"
    elif limit < need:
        reason = (
            f"not locked: services may lock {format_bytes(limit)}, "
            f"the model is {format_bytes(need)}; stackctl provision --only memlock lifts it"
        )
    else:
        reason = "mapped and locked: never paged out; given up: this memory for anything else"
        return Option("load-mode", ("mmap+mlock",), reason)
    return Option("load-mode", ("mmap",), reason)


def _numa(request: EngineRequest) -> Option:
    nodes = [node for node in request.host.cpu.numa if node.memory_bytes]
    if len(nodes) <= 1:
        return Option("numa", None, "one NUMA node: nothing to spread or bind")
    policy = request.placement.policy
    if policy in ("bind", "interleave"):
        reason = f"keeps the {policy} memory policy that the unit sets"
        if len(nodes) > 8:
            reason += f"; 'distribute' knows 8 nodes, this machine has {len(nodes)}"
        return Option("numa", ("numactl",), reason)
    if request.profile.placement.policy == "default":
        return Option("numa", None, "memory policy left to the kernel, as the profile asks")
    return Option("numa", None, "the GPU does the work")


def _caches(request: EngineRequest) -> tuple[Option, ...]:
    limit = request.memory_limit_bytes
    options = []
    if limit is not None:
        taken = _memory(request, Option("cache-ram", (0,), ""), on_gpu=False)
        room = limit - (0 if request.gpus else taken.weights_bytes) - taken.kv_bytes
        room -= taken.compute_bytes
        # A cache of more prompts than clients repeat would only take memory. Its share is computed
        # with the other stacks' claims: a later stack must not change this one's plan.
        share = (limit + request.memory_claimed_bytes) // 20
        most = min(share, _MOST_PROMPTS * max(taken.kv_bytes, _MIB), max(0, room))
        mib = min(MOST_CACHE_MIB, most // _MIB)
        reason = f"MiB of memory for prompts seen before (at most {_MOST_PROMPTS} full contexts)"
        options.append(Option("cache-ram", (mib,), reason))
    if _latency(request):
        options.append(_cache_reuse(request.model))
    return tuple(options)


def _cache_reuse(model: Model) -> Option:
    """Return --cache-reuse, if every layer keeps the whole context (llama.cpp: can_shift)."""
    if model.kv is not None and (model.kv.sliding_layers or 0 in model.kv.kv_heads):
        reason = "left out: layers with a sliding window or recurrent state cannot shift"
        return Option("cache-reuse", None, reason)
    return Option("cache-reuse", (256,), "a prompt that moved keeps its cache from 256 tokens on")
