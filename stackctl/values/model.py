"""What is known of a model: the document ``stackctl.model/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class ModelFile(Value, frozen=True, kw_only=True):
    """One file of a model: its absolute path and size."""

    path: str
    bytes: int


class KvLayout(Value, frozen=True, kw_only=True):
    """What sizes the KV cache: one entry of ``kv_heads`` a layer (0: the layer keeps no cache).

    Head dimensions are elements. ``sliding_window`` is in tokens; ``sliding_layers`` counts the
    layers that keep only the window, and ``sliding`` says which they are, one entry a layer
    (empty: none): the heads of the two kinds of layer can differ.
    """

    kv_heads: tuple[int, ...]
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    sliding_layers: int = 0
    sliding: tuple[bool, ...] = ()
    sliding_key_dim: int | None = None
    sliding_value_dim: int | None = None


class Model(Value, frozen=True, kw_only=True):
    """Facts of one model, read from its files. ``parameters`` counts all tensor elements.

    ``expert_bytes`` is the part of ``weights_bytes`` that belongs to routed experts.
    """

    schema: Literal["stackctl.model/1"] = "stackctl.model/1"
    source: str
    format: Literal["gguf"] = "gguf"
    name: str | None = None
    architecture: str
    parameters: int
    quantization: str | None = None
    weights_bytes: int
    expert_bytes: int | None = None
    layers: int
    context: int | None = None
    embedding: int | None = None
    feed_forward: int | None = None
    vocabulary: int | None = None
    experts: int | None = None
    experts_used: int | None = None
    kv: KvLayout | None = None
    chat_template: bool = False
    files: tuple[ModelFile, ...] = ()
