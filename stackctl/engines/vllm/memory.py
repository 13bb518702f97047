"""Memory that vLLM takes, by purpose: estimated, or as it reported in earlier starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from stackctl.engines.options import Option, int_option
from stackctl.engines.protocol import Footprint
from stackctl.quantity import format_bytes
from stackctl.values.engine_facts import MeasuredMemory
from stackctl.values.model import Model

_GIB = 2**30
DEFAULT_CONTEXT = 32768
#: vLLM besides weights and KV cache: CUDA graphs and context, and activations of one batch (about
#: 54 B an element of the residual stream). A first guess until the engine's own log replaces it.
_ENGINE_BYTES = 2 * _GIB
_ACTIVATION_BYTES = 54
#: Main memory of the API server and the worker.
_HOST_BYTES = 6 * _GIB
#: On a CPU: API server, engine and worker were 1.6 GB resident besides weights and KV cache (0.32).
_CPU_ENGINE_BYTES = 2 * _GIB
#: Bytes an element of a KV cache type; other types have 16 bits.
KV_TYPE_BYTES = {"fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "nvfp4": 0.5625}
#: Arguments that memory does not depend on; the model is compared as a whole.
_APART = {"", "--host", "--port", "--served-model-name", "--generation-config"}
#: Arguments that change the KV cache and the engine's own buffers, but not the weights.
_SCALING = {
    "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization", "--kv-cache-memory-bytes"
}  # fmt: skip
#: Options whose reasons quote the measured memory: they size the KV cache on a GPU and on a CPU.
_QUOTING = ("gpu-memory-utilization", "kv-cache-memory-bytes")


def footprint(
    model: Model,
    options: Mapping[str, Option],
    gpu_bytes: int,
    seen: MeasuredMemory | None = None,
) -> Footprint:
    """Return the memory by purpose.

    The KV cache takes all that the utilisation leaves on every GPU. If an earlier start reported
    weights and KV cache, the rest of the utilisation is the engine's own.
    """
    context = int_option(options, "max-model-len", model.context or DEFAULT_CONTEXT)
    batched = int_option(options, "max-num-batched-tokens", 8192)
    gpus = int_option(options, "tensor-parallel-size", 1)
    told = seen.weights_bytes if seen else None
    weights = model.weights_bytes if told is None else told * gpus
    if not gpu_bytes:
        return Footprint(
            weights_bytes=weights,
            kv_bytes=int_option(options, "kv-cache-memory-bytes", 0),
            compute_bytes=engine_bytes(model, batched, _CPU_ENGINE_BYTES),
        )
    engine = engine_bytes(model, batched)
    needed = round(kv_token_bytes(model, kv_type(options), gpus) * context)
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


def kv_token_bytes(model: Model, kv_type: str = "auto", gpus: int = 1) -> float:
    """Return bytes of the KV cache for one token of a full context, on all GPUs together.

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


def kv_type(options: Mapping[str, Option]) -> str:
    """Return the type of the KV cache that these options ask for."""
    return str(options["kv-cache-dtype"].value) if "kv-cache-dtype" in options else "auto"


def engine_bytes(model: Model, batched: int, base: int = _ENGINE_BYTES) -> int:
    """Return bytes of the engine itself and the activations of one batch of tokens."""
    return base + batched * (model.embedding or 4096) * _ACTIVATION_BYTES


def apply_measured_memory(
    seen: Sequence[MeasuredMemory], argv: Sequence[str], options: Mapping[str, Option]
) -> tuple[MeasuredMemory | None, dict[str, Option]]:
    """Return the newest start with the same arguments, else one with the same weights, and the
    options with the measured memory in their reasons."""
    mine = _settings(argv).items()
    differing = [(one, {name for name, _ in mine ^ _settings(one.argv).items()}) for one in seen]
    alike = [(one, names) for one, names in differing if names <= _SCALING]
    known = next((one for one, names in alike if not names), None)
    if known is None:
        weights = next((one for one, _ in alike if one.weights_bytes), None)
        if weights is None:
            return None, dict(options)
        known = msgspec.structs.replace(weights, kv_bytes=None, kv_tokens=None)
    result = dict(options)
    for name in _QUOTING:
        if name in result and result[name].values is not None:
            result[name] = _with_measurement(result[name], known)
    return known, result


def _with_measurement(option: Option, memory: MeasuredMemory) -> Option:
    where = f"in generation {memory.generation}"
    if memory.kv_tokens is not None:
        reason = f"{option.reason}; vLLM measured {memory.kv_tokens:,} tokens of KV cache {where}"
        source = "measured" if option.source == "derived" else option.source
        return replace(option, reason=reason, source=source)
    if memory.weights_bytes is None:
        return option
    weights = format_bytes(memory.weights_bytes)
    return replace(option, reason=f"{option.reason}; vLLM measured weights of {weights} {where}")


def _settings(argv: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return each option with its values; words before the first option have the name ""."""
    found: dict[str, tuple[str, ...]] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            name = token
            found.setdefault(name, ())
        else:
            found[name] = (*found.get(name, ()), token)
    return {name: values for name, values in found.items() if name not in _APART}
