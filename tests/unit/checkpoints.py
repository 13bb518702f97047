"""Writes small Hugging Face folders: config.json and safetensors files with empty data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackctl.sources.safetensors import BITS

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 32,
    "torch_dtype": "bfloat16",
}
EMBED = {"model.embed_tokens.weight": ("BF16", (32, 64))}
HEAD = {"lm_head.weight": ("BF16", (32, 64))}
PLAIN: dict[str, tuple[str, tuple[int, ...]]] = {
    **EMBED,
    **HEAD,
    "model.layers.0.mlp.up_proj.weight": ("BF16", (128, 64)),
    "model.norm.weight": ("BF16", (64,)),
}


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def safetensors(shapes: Shapes, **changes: Any) -> bytes:
    """The bytes of a file; ``changes`` replaces keys of the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header.update(changes)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def raw_header(text: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(data)


def checkpoint(folder: Path, shapes: Shapes = PLAIN, **config: Any) -> Path:
    """A folder with one file; a None takes a key of the configuration away."""
    folder.mkdir(exist_ok=True, parents=True)
    merged = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    (folder / "model.safetensors").write_bytes(safetensors(shapes))
    return folder


def sharded(folder: Path, shapes: Shapes = PLAIN, count: int = 2, **config: Any) -> Path:
    """The same in several files with an index."""
    checkpoint(folder, shapes, **config)
    (folder / "model.safetensors").unlink()
    names = list(shapes)
    placed = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: shapes[name] for name in names[number::count]}
        (folder / file).write_bytes(safetensors(part))
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
