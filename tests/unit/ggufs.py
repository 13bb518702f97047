"""Writes small GGUF files by hand, from a compact description."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stackctl.sources.ggml_types import TENSOR_TYPES

CODES = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class As:
    """A value or list of an exact metadata type; plain ints are u32, floats f32."""

    kind: str
    value: object


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: Sequence[int] = (32,)
    kind: str | int = "F32"
    offset: int | None = None


Value = int | float | bool | str | As | Sequence[object]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    if isinstance(value, As):
        number, code = CODES[value.kind]
        if isinstance(value.value, list | tuple):
            body = struct.pack(f"<{len(value.value)}{code}", *value.value)
            return struct.pack("<IIQ", 9, number, len(value.value)) + body
        return struct.pack("<I", number) + struct.pack(f"<{code}", value.value)
    if isinstance(value, bool):
        return _value(As("bool", value))
    if isinstance(value, int):
        return _value(As("u32", value))
    if isinstance(value, float):
        return _value(As("f32", value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    assert isinstance(value, list | tuple)
    if value and isinstance(value[0], str):
        body = b"".join(text(str(item)) for item in value)
        return struct.pack("<IIQ", 9, 8, len(value)) + body
    return _value(As("bool" if value and isinstance(value[0], bool) else "u32", value))


def size_of(tensor: Tensor) -> int:
    if isinstance(tensor.kind, int) or tensor.kind not in TYPE_NUMBERS:
        return 0
    _, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[tensor.kind]]
    elements = 1
    for length in tensor.shape:
        elements *= length
    return elements // block * block_bytes


def gguf(
    metadata: Mapping[str, Value] | Sequence[tuple[str, Value]],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    magic: bytes = b"GGUF",
    keys: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """The bytes of a file; ``keys`` and ``tensor_count`` replace the true counts."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if keys is None else keys,
    )
    for key, value in pairs:
        out += text(key) + _value(value)
    sizes = []
    offset = 0
    for tensor in tensors:
        kind = TYPE_NUMBERS[tensor.kind] if isinstance(tensor.kind, str) else tensor.kind
        place = offset if tensor.offset is None else tensor.offset
        out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, kind, place)
        sizes.append(size_of(tensor))
        offset += -(-sizes[-1] // alignment) * alignment
    if tensors:
        out += bytes(-len(out) % alignment)
        for index, size in enumerate(sizes):
            out += bytes(size)
            if index < len(sizes) - 1:
                out += bytes(-size % alignment)
    return out


LLAMA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.type": "model",
    "general.file_type": 15,
    "llama.block_count": 4,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["<s>", "", "wörd", "x" * 300],
    "tokenizer.ggml.scores": As("f32", [0.0, 1.0, 2.0, 3.0]),
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = (
    Tensor("token_embd.weight", (64, 4), "Q8_0"),
    Tensor("blk.0.attn_norm.weight", (64,), "F32"),
    Tensor("blk.0.ffn_up.weight", (256, 3), "Q4_K"),
)


def write(
    path: Path,
    changes: Mapping[str, Value | None] | None = None,
    *,
    base: Mapping[str, Value] = LLAMA,
    tensors: Sequence[Tensor] = TENSORS,
) -> Path:
    """Write a model: ``base`` with changes; None takes a key away."""
    metadata = {**base, **(changes or {})}
    path.write_bytes(gguf({k: v for k, v in metadata.items() if v is not None}, tensors))
    return path


def write_shards(folder: Path, stem: str = "m", count: int = 3) -> list[Path]:
    """A sharded model as llama-gguf-split writes it: metadata and two tensors in the first."""
    paths = []
    for index in range(count):
        split: dict[str, Value] = {
            "split.no": As("u16", index),
            "split.count": As("u16", count),
            "split.tensors.count": As("i32", count + 1),
        }
        names = [f"blk.{index}.a.weight"] + (["output.weight"] if index == 0 else [])
        path = folder / f"{stem}-{index + 1:05}-of-{count:05}.gguf"
        base = LLAMA if index == 0 else {}
        paths.append(write(path, split, base=base, tensors=[Tensor(name) for name in names]))
    return paths
