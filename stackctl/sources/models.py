"""Reads what is known of a model from its source."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.catalogue import read_entry
from stackctl.sources.ggufmodel import read_gguf
from stackctl.sources.hubcache import read_hub
from stackctl.sources.huggingface import read_folder
from stackctl.sources.locate import absolute, read_bytes, real
from stackctl.values.base import from_json
from stackctl.values.model import Model

_MAX_FACTS_BYTES: Final = 1 << 20
_COUNTS: Final = (
    *("active_parameters", "expert_bytes", "embedding_bytes", "context", "embedding"),
    *("feed_forward", "heads", "vocabulary", "experts", "experts_used"),
)


def read_model(source: str) -> Model:
    """Read a model from ``file:PATH`` (GGUF, sharded or not; also a bare ``*.gguf`` path),
    ``dir:PATH`` (a Hugging Face folder), ``hf:ORG/REPO[@REV][:QUANT]`` (the local hub cache, else
    the catalogue), ``catalogue:ID`` or ``facts:FILE`` (a ``stackctl.model/1`` document).

    Raises:
        StackctlError: exit 2 for a source that is not understood, 4 for an unknown catalogue
            entry, 5 for a GGUF file that is no model, 1 for missing, damaged or unreadable files.
    """
    kind, colon, rest = source.partition(":")
    if colon and not rest:
        raise StackctlError(f"model source {source!r} names nothing", exit_code=ExitCode.USAGE)
    if colon and kind in _READERS:
        try:
            return _READERS[kind](rest)
        except OSError as error:  # a folder that may not be looked into
            raise StackctlError(f"cannot read {source}: {error.strerror or error}") from None
    if source.endswith(".gguf") and not re.match(r"[a-z]+://", source):
        return read_gguf(source)
    raise StackctlError(
        f"model source {source!r} is not understood",
        hint="give file:PATH, dir:PATH, hf:ORG/REPO, catalogue:ID or facts:FILE",
        exit_code=ExitCode.USAGE,
    )


def _read_facts(text: str) -> Model:
    path = absolute(text)
    real(path, "facts file")
    model = from_json(read_bytes(path, _MAX_FACTS_BYTES), Model, where=str(path))
    kv = model.kv
    wrong = None
    counts = (model.parameters, model.weights_bytes, *(getattr(model, name) for name in _COUNTS))
    if model.layers < 1 or model.passes < 1 or min(n for n in counts if n is not None) < 0:
        wrong = "layers and passes must be at least 1, and no other number negative"
    elif kv is not None and len(kv.kv_heads) != model.layers:
        wrong = f"kv.kv_heads has {len(kv.kv_heads)} entries for {model.layers} layers"
    elif kv is not None and min(*kv.kv_heads, kv.key_dim, kv.value_dim, kv.sliding_layers) < 0:
        wrong = "kv must not hold negative numbers"
    elif kv is not None and kv.sliding and len(kv.sliding) != model.layers:
        wrong = f"kv.sliding has {len(kv.sliding)} entries for {model.layers} layers"
    if wrong:
        raise StackctlError(f"{path}: {wrong}", exit_code=ExitCode.USAGE)
    return model


_READERS: Final[dict[str, Callable[[str], Model]]] = {
    "file": read_gguf,
    "dir": read_folder,
    "hf": read_hub,
    "catalogue": read_entry,
    "facts": _read_facts,
}
