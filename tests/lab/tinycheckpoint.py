"""A Llama model of 0.7 MB as a folder of Hugging Face files, for the real vLLM.

It is not trained: it answers every prompt with the words below in their order, endlessly. An answer
is therefore text, is the same each time and never ends by itself. Its layers add nothing, because
the matrices that write into the residual stream are zero. The last token alone selects the next
one, through embeddings that are random signs.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 128, 4, 2, 256, 2, 2048
_TEXT = (
    "ants badgers cats dogs eels foxes geese hens ibises jays kites larks mice newts otters "
    "pigs quails rats seals toads urchins voles wasps yaks zebras and apples beans carrots "
    "dates endives figs grapes hazelnuts icebergs juniper kale lemons melons nuts olives peas "
    "quinces rice spinach turnips vanilla walnuts yams with amber bronze copper diamonds "
    "emeralds flint gold hematite iron jade kaolin lead marble nickel opal pearls quartz rubies "
    "silver tin under clouds rain snow"
)
WORDS = _TEXT.split()
_SPECIAL = ("<s>", "</s>")


def write_checkpoint(folder: Path) -> None:
    """Make the folder with its files."""
    folder.mkdir()
    tokens = [*_SPECIAL, *_bytes(), *(f"\u0120{word}" for word in WORDS)]
    files = {
        "config.json": _config(len(tokens)),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer.json": _tokenizer(tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": CONTEXT,
            "chat_template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "model.safetensors").write_bytes(_weights(len(tokens)))
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)


def _config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _bytes() -> list[str]:
    """Return the characters that byte-level tokenizers write for the bytes.

    A printable byte is written as itself, the others as the characters from U+0100 on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256))
    return [chr(byte) if byte in plain else chr(256 + next(others)) for byte in range(256)]


def _tokenizer(tokens: list[str]) -> dict[str, object]:
    """Return a tokenizer that reads texts byte by byte (no merges).

    Words occur only in its output.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {"id": number, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for number, text in enumerate(_SPECIAL)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {text: number for number, text in enumerate(tokens)}, "merges": [],
        },
    }  # fmt: skip


def _weights(vocabulary: int) -> bytes:
    """Return the file model.safetensors, in bfloat16."""
    dice = random.Random(1)
    keys = WIDTH // HEADS * KV_HEADS
    zero = struct.pack("<H", 0)
    first = vocabulary - len(WORDS)
    signs = [[dice.choice((-1.0, 1.0)) for _ in range(WIDTH)] for _ in range(len(WORDS) + 1)]
    # All tokens that are not words have one embedding, after which the first word follows.
    embeddings = [signs[0]] * first + signs[1:]
    silent = [0.0] * WIDTH
    # The head of a word matches the signs of the word before it, that of the first word also those
    # of the last.
    heads = [silent] * first + [[0.2 * value for value in row] for row in signs[:-1]]
    heads[first] = [0.2 * (one + other) for one, other in zip(signs[0], signs[-1], strict=True)]
    tensors: list[tuple[str, list[int], bytes]] = [
        ("model.embed_tokens.weight", [vocabulary, WIDTH], _rows(embeddings)),
        ("model.norm.weight", [WIDTH], _rows([[1.0] * WIDTH])),
        ("lm_head.weight", [vocabulary, WIDTH], _rows(heads)),
    ]
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": [WIDTH],
            "post_attention_layernorm": [WIDTH],
            "self_attn.q_proj": [WIDTH, WIDTH],
            "self_attn.k_proj": [keys, WIDTH],
            "self_attn.v_proj": [keys, WIDTH],
            "self_attn.o_proj": [WIDTH, WIDTH],
            "mlp.gate_proj": [INNER, WIDTH],
            "mlp.up_proj": [INNER, WIDTH],
            "mlp.down_proj": [WIDTH, INNER],
        }
        for name, shape in parts.items():
            rows, width = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
            if name.endswith(("o_proj", "down_proj")):
                data = zero * rows * width
            elif name.endswith("layernorm"):
                data = _rows([[1.0] * width])
            else:
                data = _rows([[dice.gauss(0, 0.02) for _ in range(width)] for _ in range(rows)])
            tensors.append((f"model.layers.{layer}.{name}.weight", shape, data))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, data in tensors:
        header[name] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)],
        }  # fmt: skip
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors)


def _rows(rows: list[list[float]]) -> bytes:
    """Return rows of numbers as bfloat16: the upper half of a float, truncated."""
    values = [value for row in rows for value in row]
    raw = struct.pack(f"<{len(values)}f", *values)
    return b"".join(raw[place + 2 : place + 4] for place in range(0, len(raw), 4))
