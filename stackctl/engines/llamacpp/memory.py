"""Memory that llama-server takes, by purpose."""

from __future__ import annotations

from collections.abc import Mapping

from stackctl.engines.options import Option, int_option
from stackctl.engines.protocol import Footprint
from stackctl.values.model import Model

_MIB = 2**20
#: Contexts are padded to this many tokens (llama.cpp: GGML_PAD(n_ctx, 256)).
CONTEXT_STEP = 256
#: Bytes an element of a KV cache type: a block's bytes over its elements (ggml block layouts).
KV_TYPE_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip
#: llama-server itself (code, libraries, thread stacks, HTTP), and a word of its vocabulary.
_ENGINE_BYTES = 40 * _MIB
_VOCABULARY_BYTES = 256
#: GPU memory of a CUDA context and its kernels, before the first tensor.
_GPU_CONTEXT_BYTES = 600 * _MIB
DEFAULT_CONTEXT = 8192
#: llama-server's own default for --cache-ram, in MiB.
MOST_CACHE_MIB = 8192


def footprint(model: Model, options: Mapping[str, Option], *, on_gpu: bool) -> Footprint:
    """Return the memory by purpose; on a GPU ``host`` is the part that stays in main memory."""
    context = int_option(options, "ctx-size", 0) or model.context or DEFAULT_CONTEXT
    batch = int_option(options, "batch-size", 2048)
    ubatch = min(batch, int_option(options, "ubatch-size", 512))
    kv = kv_bytes(
        model,
        context=context,
        parallel=max(1, int_option(options, "parallel", 4)),
        ubatch=ubatch,
        key_bytes=_kv_type(options, "cache-type-k"),
        value_bytes=_kv_type(options, "cache-type-v"),
    )
    # Per token of a micro-batch the residual stream and the feed-forward layer in F32; logits for
    # one token of each slot. Measured with Gemma 3 270M: within 6 % of the resident size.
    vocabulary = model.vocabulary or 0
    graph = ubatch * (4 * (model.embedding or 0) + 3 * (model.feed_forward or 0)) * 4
    graph += max(1, int_option(options, "parallel", 4)) * vocabulary * 4
    header = max(0, sum(file.bytes for file in model.files) - model.weights_bytes)
    cache = max(0, int_option(options, "cache-ram", MOST_CACHE_MIB)) * _MIB
    server = _ENGINE_BYTES + vocabulary * _VOCABULARY_BYTES + header + cache
    if not on_gpu:
        return Footprint(model.weights_bytes, kv, graph + server, cache)
    # The attention mask, 2 B for each token of context and micro-batch (measured: 4,096 B a token
    # at 2048). A GPU allocates it whole; in main memory it grows with the prompts that are sent.
    graph += context * ubatch * 2
    kept = min(model.weights_bytes, (model.embedding_bytes or 0) + cpu_expert_bytes(model, options))
    return Footprint(
        weights_bytes=model.weights_bytes - kept,
        kv_bytes=kv,
        compute_bytes=graph + _GPU_CONTEXT_BYTES,
        host=Footprint(weights_bytes=kept, kv_bytes=0, compute_bytes=server, cache_bytes=cache),
    )


def kv_token_bytes(model: Model, options: Mapping[str, Option], gpus: int = 1) -> float:  # noqa: ARG001
    """See Engine. Layers with a sliding window count with their share of 4,096 tokens."""
    tokens = 4096
    return (
        kv_bytes(
            model,
            context=tokens,
            key_bytes=_kv_type(options, "cache-type-k"),
            value_bytes=_kv_type(options, "cache-type-v"),
        )
        / tokens
    )


def weights_read_on_cpu(model: Model, options: Mapping[str, Option], *, on_gpu: bool) -> float:
    """See Engine. The active experts that stay on the CPU are read there."""
    if not on_gpu:
        return float(model.active_bytes)
    return cpu_expert_bytes(model, options) * (model.experts_used or 1) / (model.experts or 1)


def cpu_expert_bytes(model: Model, options: Mapping[str, Option]) -> int:
    """Return bytes of the experts that --n-cpu-moe keeps on the CPU; all layers count the same."""
    layers = int_option(options, "n-cpu-moe", 0)
    return round((model.expert_bytes or 0) * min(layers, model.layers) / max(1, model.layers))


def kv_bytes(
    model: Model,
    *,
    context: int,
    parallel: int = 1,
    ubatch: int = 512,
    key_bytes: float = 2.0,
    value_bytes: float = 2.0,
) -> int:
    """Return bytes of the KV cache of all slots together.

    Each layer keeps ``kv_heads * (key_dim * key_bytes + value_dim * value_bytes)`` a token; layers
    with a sliding window keep the window of every sequence and one micro-batch (llama.cpp:
    llama_kv_cache_iswa).
    """
    if model.kv is None:
        return 0
    layout = model.kv
    padded = window = padded_context(context)
    if layout.sliding_window is not None:
        window = min(padded, padded_context(layout.sliding_window * parallel + ubatch))
    row = layout.key_dim * key_bytes + layout.value_dim * value_bytes
    narrow = (layout.sliding_key_dim or layout.key_dim) * key_bytes
    narrow += (layout.sliding_value_dim or layout.value_dim) * value_bytes
    sliding = layout.sliding or (False,) * len(layout.kv_heads)
    return model.kv.state_bytes * parallel + round(
        sum(
            heads * (window * narrow if slides else padded * row)
            for heads, slides in zip(layout.kv_heads, sliding, strict=True)
        )
    )


def padded_context(tokens: int) -> int:
    """Return a context rounded up to the step in which llama.cpp allocates it, in tokens."""
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP


def _kv_type(options: Mapping[str, Option], name: str) -> float:
    value = options[name].value if name in options else None
    return KV_TYPE_BYTES.get(str(value), 2.0)
