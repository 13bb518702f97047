"""Choice of vLLM's options."""

from __future__ import annotations

import math

from stackctl.engines import model_mounts
from stackctl.engines.options import Option
from stackctl.engines.protocol import EngineRequest, value_source
from stackctl.engines.vllm.memory import DEFAULT_CONTEXT, engine_bytes, kv_token_bytes
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes

_GIB = 2**30
#: vLLM's own default for --gpu-memory-utilization. The rest holds memory that it does not count.
_USUAL_UTILIZATION = 0.92


def plan_options(request: EngineRequest) -> tuple[Option, ...]:
    """Return the options for this machine, model and objective, each with its reason."""
    profile, latency = request.profile, request.profile.objective == "latency"
    context, why_context = request.context(DEFAULT_CONTEXT)
    seqs, why_seqs = request.requests(throughput=64)
    kv_type = profile.kv_type or "auto"
    if why_context is None:
        why_context = f"{format_bytes(round(kv_token_bytes(request.model, kv_type)))} a token"
    method = request.model.quantization_method
    if latency:
        batched = 8192 if request.gpus else 2048
        why_batched = (
            "latency: short steps keep tokens coming; given up: prompt speed of many at once"
        )
        mode, why_mode = "interactivity", "latency objective: fast steps for few requests"
    else:
        batched = 16384 if request.gpus else 4096
        why_batched = "throughput: more prompt tokens a step; given up: steady answers meanwhile"
        mode, why_mode = "throughput", "throughput objective: large steps for many requests"
    options = [
        Option("model", (request.model_path,), "the model"),
        _names(request),
        Option("host", ("127.0.0.1",), "loopback only"),
        request.listen("port"),
        Option("max-model-len", (context,), why_context, value_source(request, "context")),
        Option("max-num-seqs", (seqs,), why_seqs, value_source(request, "concurrency")),
        Option("max-num-batched-tokens", (batched,), why_batched),
        Option("performance-mode", (mode,), why_mode),
    ]
    if kv_type != "auto":
        source = value_source(request, "kv_type")
        options.append(Option("kv-cache-dtype", (kv_type,), "kv_type", source))
    checkpoint = f"in the checkpoint: {method}" if method else "read from the checkpoint"
    options += (
        _utilization(request, context, batched, kv_type)
        if request.gpus
        else _cpu_cache(request, context, seqs, kv_type),
        Option("enable-prefix-caching", (), "a prompt's known beginning is not computed again"),
        Option("enable-prompt-tokens-details", (), "answers tell what of it was in the cache"),
        Option("quantization", None, checkpoint),
    )
    if len(request.gpus) > 1:
        reason = "each weight is split over the GPUs"
        options.append(Option("tensor-parallel-size", (len(request.gpus),), reason))
    if profile.trust_remote_code:
        options.append(_remote_code(request))
    sampling = "clients choose the sampling; given up: the checkpoint's defaults"
    options.append(Option("generation-config", ("vllm",), sampling))
    return tuple(options)


def _cpu_cache(request: EngineRequest, context: int, seqs: int, kv_type: str) -> Option:
    """Return the size of the KV cache: all requests at full context, at least 1 GiB."""
    wanted = round(kv_token_bytes(request.model, kv_type) * context * seqs)
    size = max(_GIB, -(-wanted // _GIB) * _GIB)
    many = f"{seqs} requests" if seqs > 1 else "one request"
    reason = f"{many} of {context:,} tokens, in whole GiB; spare room is prefix cache"
    return Option("kv-cache-memory-bytes", (size,), reason)


def _names(request: EngineRequest) -> Option:
    others = request.profile.other_names
    reason = "the name clients ask for"
    if others:
        reason = f"answers give it as {request.served_name}; clients may ask for any of them"
    return Option("served-model-name", (request.served_name, *others), reason)


def _remote_code(request: EngineRequest) -> Option:
    """Return --trust-remote-code. Raises StackctlError (exit 2) without a commit of the model."""
    commit = model_mounts.snapshot_commit(request.model)
    if commit is None:
        raise StackctlError(
            f"trust_remote_code: nothing tells the commit of {request.model.source}",
            hint="a model from the hub's cache: --model hf:ORG/REPO@COMMIT",
            exit_code=ExitCode.USAGE,
        )
    return Option(
        "trust-remote-code",
        (),
        f"the code of commit {commit[:12]} is trusted",
        value_source(request, "trust_remote_code"),
    )


def _utilization(request: EngineRequest, context: int, batched: int, kv_type: str) -> Option:
    """Return the highest utilization that the reserve and other stacks allow.

    Spare memory is used as prefix cache.
    """
    total, limit = request.gpu_bytes, request.gpu_limit_bytes
    if not total or limit is None:
        return Option("gpu-memory-utilization", (_USUAL_UTILIZATION,), "GPU memory unknown")
    gpus = max(1, len(request.gpus))
    per_token = kv_token_bytes(request.model, kv_type, gpus) / gpus
    fixed = request.model.weights_bytes / gpus + engine_bytes(request.model, batched)
    needed = fixed + per_token * context
    share = min(limit / total, max(_USUAL_UTILIZATION, math.ceil(needed / total * 10000) / 10000))
    # Two decimals, unless the context needs the rest.
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
