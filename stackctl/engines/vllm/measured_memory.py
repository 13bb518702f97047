"""Memory that vLLM reported in earlier starts, for the plan of the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from stackctl.engines.options import Option
from stackctl.quantity import format_bytes
from stackctl.values.engine_facts import MeasuredMemory

#: Arguments that memory does not depend on; the model is compared as a whole.
_APART = {"", "--host", "--port", "--served-model-name", "--generation-config"}
#: Arguments that change the KV cache and the engine's own buffers, but not the weights.
_SCALING = {
    "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization", "--kv-cache-memory-bytes"
}  # fmt: skip
#: Options whose reasons quote the measured memory: they size the KV cache on a GPU and on a CPU.
_QUOTING = ("gpu-memory-utilization", "kv-cache-memory-bytes")


def apply_measured_memory(
    seen: Sequence[MeasuredMemory], argv: Sequence[str], options: Mapping[str, Option]
) -> tuple[MeasuredMemory | None, dict[str, Option]]:
    """Return the newest start with the same arguments, else one with the same weights, and the
    options with the measured memory in their reasons."""
    mine = _settings(argv)
    differing = [(one, _differing(mine, _settings(one.argv))) for one in seen]
    alike = [(one, found) for one, found in differing if found <= _SCALING]
    same = next((one for one, found in alike if not found), None)
    known = same or next((_weights(one) for one, _ in alike if one.weights_bytes), None)
    if known is None:
        return None, dict(options)
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


def _weights(memory: MeasuredMemory) -> MeasuredMemory:
    return msgspec.structs.replace(memory, kv_bytes=None, kv_tokens=None)


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


def _differing(
    mine: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]
) -> set[str]:
    return {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
