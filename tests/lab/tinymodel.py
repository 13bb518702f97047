"""A Llama model of 1.4 MB that llama-server loads at once: small enough to be locked in memory.

Its weights are zero. It always answers with its first token, which is enough for the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 128, 4, 2, 256, 2, 2048
# An SPM vocabulary: three control tokens, a token for each byte, and a few words.
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
TOKENS += ["\u2581", "\u2581the", "\u2581a", "e", "t", "o", "n"]
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_U16, _U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 2, 4, 5, 6, 7, 8, 9
_ALIGNMENT = 32


def tiny_model() -> bytes:
    """Return the bytes of the GGUF file."""
    return _file(_metadata(), _tensors())


def tiny_shards(count: int) -> list[bytes]:
    """Return the same model in several files, as llama-gguf-split makes them."""
    tensors = _tensors()
    step = -(-len(tensors) // count)
    files = []
    for number in range(count):
        pairs = [] if number else _metadata()
        pairs += [
            ("split.no", _one(_U16, number)),
            ("split.count", _one(_U16, count)),
            ("split.tensors.count", _one(_I32, len(tensors))),
        ]
        files.append(_file(pairs, tensors[number * step : (number + 1) * step]))
    return files


def _metadata() -> list[tuple[str, bytes]]:
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    kinds += [_NORMAL] * (len(TOKENS) - len(kinds))
    return [
        ("general.architecture", _one(_TEXT, "llama")),
        ("general.name", _one(_TEXT, "Tiny")),
        ("general.file_type", _one(_U32, 0)),
        ("llama.block_count", _one(_U32, LAYERS)),
        ("llama.context_length", _one(_U32, CONTEXT)),
        ("llama.embedding_length", _one(_U32, WIDTH)),
        ("llama.feed_forward_length", _one(_U32, INNER)),
        ("llama.attention.head_count", _one(_U32, HEADS)),
        ("llama.attention.head_count_kv", _one(_U32, KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", _one(_F32, 1e-5)),
        ("llama.rope.dimension_count", _one(_U32, WIDTH // HEADS)),
        ("tokenizer.ggml.model", _one(_TEXT, "llama")),
        ("tokenizer.ggml.tokens", _many(_TEXT, TOKENS)),
        ("tokenizer.ggml.scores", _many(_F32, [-float(i) for i in range(len(TOKENS))])),
        ("tokenizer.ggml.token_type", _many(_I32, kinds)),
        ("tokenizer.ggml.bos_token_id", _one(_U32, 1)),
        ("tokenizer.ggml.eos_token_id", _one(_U32, 2)),
        ("tokenizer.ggml.unknown_token_id", _one(_U32, 0)),
        ("tokenizer.ggml.add_bos_token", _one(_BOOL, True)),
    ]


def _file(
    pairs: Sequence[tuple[str, bytes]], tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, value in pairs:
        out += _text(key) + value
    offset = 0
    for name, shape in tensors:
        out += _text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)
        offset += _bytes(shape)
    return out + bytes(-len(out) % _ALIGNMENT) + bytes(offset)


def _tensors() -> list[tuple[str, tuple[int, ...]]]:
    keys = WIDTH // HEADS * KV_HEADS
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (WIDTH, len(TOKENS)))]
    for layer in range(LAYERS):
        parts = {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH, keys),
            "attn_v": (WIDTH, keys),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (WIDTH, INNER),
            "ffn_up": (WIDTH, INNER),
            "ffn_down": (INNER, WIDTH),
        }
        found += [(f"blk.{layer}.{name}.weight", shape) for name, shape in parts.items()]
    return [*found, ("output_norm.weight", (WIDTH,)), ("output.weight", (WIDTH, len(TOKENS)))]


def _bytes(shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of 32-bit floats, padded to the alignment of the next one."""
    size = 4
    for length in shape:
        size *= length
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _item(kind: int, value: object) -> bytes:
    if kind == _TEXT:
        return _text(str(value))
    return struct.pack({_U16: "<H", _U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}[kind], value)


def _one(kind: int, value: object) -> bytes:
    return struct.pack("<I", kind) + _item(kind, value)


def _many(kind: int, values: Sequence[object]) -> bytes:
    items = b"".join(_item(kind, value) for value in values)
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + items
