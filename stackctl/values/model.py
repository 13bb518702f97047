"""The facts of a model: the document ``stackctl.model/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

#: Formats of model files; each has a reader in ``sources/``.
ModelFormat = Literal["gguf", "safetensors"]


class ModelFile(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One file of a model: its absolute path and size.

    ``name`` is its name if the path does not end in it: files in the hub's cache are links to
    blobs.
    """

    path: str
    bytes: int
    name: str | None = None

    @property
    def file_name(self) -> str:
        """Return the file's name, from which engines derive the number of the shard."""
        return self.name or self.path.rpartition("/")[2]


class KvLayout(Value, frozen=True, kw_only=True):
    """The dimensions of the KV cache. ``kv_heads`` has one entry per layer (0: no cache).

    Head dimensions are in elements. ``kind`` is for display: grouped-query attention (also
    multi-head and multi-query), multi-head latent attention (one "head" of the latent's width, no
    values), or a mix of layers with and without a cache. ``sliding_window`` is in tokens;
    ``sliding_layers`` counts the layers that keep only the window. ``sliding`` marks them, one
    entry per layer (empty: no such layer), because the heads of the two kinds of layers can differ.
    ``state_bytes`` is the fixed state of recurrent layers, for one sequence.
    """

    kind: Literal["gqa", "mla", "hybrid"] = "gqa"
    kv_heads: tuple[int, ...]
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    sliding_layers: int = 0
    sliding: tuple[bool, ...] = ()
    sliding_key_dim: int | None = None
    sliding_value_dim: int | None = None
    state_bytes: int = 0


class Model(Value, frozen=True, kw_only=True):
    """Facts of one model, from its files or from the catalogue.

    ``parameters`` counts all weights once; ``active_parameters`` those that compute for one token
    (for an MoE its shared part and ``experts_used`` of ``experts``; the embedding table, of which a
    token reads one row, is left out). ``weights_bytes`` is the size of all tensors,
    ``expert_bytes`` the part of it in routed experts, ``embedding_bytes`` the part that generation
    does not read: tables of which a token reads one row (not an embedding that is the output too),
    and layers for images, sound or drafts. ``passes`` is the number of times that the layers run
    for one token (2 for the Loop variant). ``quantization`` is a label such as Q4_K_M, nvfp4, fp8;
    ``quantization_method`` is the tool or format behind it (modelopt, compressed-tensors, gptq,
    awq). ``folder`` is the absolute path of a checkpoint's folder, with its config and tokenizer
    (None for a GGUF, and for facts without files). ``facts`` is the origin of these facts: "file",
    or the catalogue's source. ``unsupported`` names engines that cannot run the model, each as
    "ENGINE: reason".
    """

    schema: Literal["stackctl.model/1"] = "stackctl.model/1"
    source: str
    format: ModelFormat = "gguf"
    facts: str = "file"
    name: str | None = None
    architecture: str
    parameters: int
    active_parameters: int | None = None
    quantization: str | None = None
    quantization_method: str | None = None
    weights_bytes: int
    expert_bytes: int | None = None
    embedding_bytes: int | None = None
    layers: int
    passes: int = 1
    context: int | None = None
    embedding: int | None = None
    feed_forward: int | None = None
    heads: int | None = None
    vocabulary: int | None = None
    experts: int | None = None
    experts_used: int | None = None
    kv: KvLayout | None = None
    chat_template: bool = False
    files: tuple[ModelFile, ...] = ()
    folder: str | None = None
    unsupported: tuple[str, ...] = ()

    @property
    def is_nvfp4(self) -> bool:
        """Return True if the weights are quantised to nvfp4."""
        label = (self.quantization or "").lower().replace("_", "")
        return "fp4" in (self.quantization_method or "") or "nvfp4" in label

    def reason_unsupported(self, engine: str) -> str | None:
        """Return the reason why an engine cannot run the model; None if no reason is known."""
        reasons = (entry.partition(": ") for entry in self.unsupported)
        return next((reason for name, _, reason in reasons if name == engine), None)

    @property
    def active_bytes(self) -> int:
        """Return the weight bytes that one token reads in one pass.

        These are all weights without idle experts and without ``embedding_bytes``.
        """
        read = self.weights_bytes - (self.embedding_bytes or 0)
        if self.expert_bytes and self.experts and self.experts_used:
            read -= round(self.expert_bytes * (1 - self.experts_used / self.experts))
        return max(1, read)
