"""Reader of a model's facts from any kind of source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.catalogue import catalogue_entries
from stackctl.sources.gguf_model import read_gguf
from stackctl.sources.hub_cache import parse_remote, read_catalogue, read_hub
from stackctl.sources.huggingface import read_folder
from stackctl.sources.source_files import read_bytes, real_path, resolve_path
from stackctl.values.base import from_json
from stackctl.values.model import KvLayout, Model

_MAX_FACTS_BYTES: Final = 1 << 20
_MOST_LAYERS: Final = 1024
_KV_COUNTS: Final = (
    *("key_dim", "value_dim", "sliding_window", "sliding_key_dim", "sliding_value_dim"),
    "state_bytes",
)
_COUNTS: Final = (
    *("active_parameters", "expert_bytes", "embedding_bytes", "context", "embedding"),
    *("feed_forward", "heads", "vocabulary", "experts", "experts_used"),
)


def read_model(source: str) -> Model:
    """Read the facts of a model from its source. Nothing is downloaded.

    Sources are ``file:PATH`` (GGUF, sharded or not; also a bare ``*.gguf`` path), ``dir:PATH`` (a
    Hugging Face folder), ``hf:ORG/REPO[@REV][:QUANT or FILE]`` (the local hub cache, else the
    catalogue), ``https://...`` (a download in the store), ``catalogue:ID`` (the files that were
    fetched for it, else facts) and ``facts:FILE`` (a ``stackctl.model/1`` document).

    Raises:
        StackctlError: exit 2 for a source that is not understood or facts that contradict each
            other, 4 for an unknown catalogue entry, 5 for a GGUF file that does not hold a model, 1
            for missing, damaged or unreadable files.
    """
    kind, colon, rest = source.partition(":")
    if colon and not rest:
        raise StackctlError(f"model source {source!r} names nothing", exit_code=ExitCode.USAGE)
    try:
        if (parsed := parse_remote(source)) is not None:
            return read_hub(source, parsed)
        if colon and kind in _READERS:
            return _READERS[kind](rest)
    except OSError as error:  # a folder without read permission
        where = error.filename or source
        raise StackctlError(f"cannot read {where}: {error.strerror or error}") from None
    if source.endswith(".gguf") and not re.match(r"[a-z]+://", source):
        return read_gguf(source)
    raise StackctlError(
        f"model source {source!r} is not understood",
        hint=_meant(source) or "give file:PATH, dir:PATH, hf:ORG/REPO, catalogue:ID or facts:FILE",
        exit_code=ExitCode.USAGE,
    )


def _meant(source: str) -> str | None:
    """Return a hint for a source without a kind: the source that was probably meant."""
    if source in catalogue_entries():
        return f"did you mean catalogue:{source}?"
    try:
        path = Path(source).expanduser()
        if path.exists():
            kind = "dir" if path.is_dir() else "facts" if path.suffix == ".json" else "file"
            return f"did you mean {kind}:{source}?"
    except (OSError, RuntimeError, ValueError):
        return None
    return f"did you mean hf:{source}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None


def _read_facts(text: str) -> Model:
    path = resolve_path(text)
    real_path(path, "facts file")
    model = from_json(read_bytes(path, _MAX_FACTS_BYTES), Model, where=str(path))
    wrong = _wrong(model)
    if wrong:
        raise StackctlError(f"{path}: {wrong}", exit_code=ExitCode.USAGE)
    return model


def _wrong(model: Model) -> str | None:
    """Return the contradiction in the facts of a model; None if there is none."""
    counts = [model.parameters, model.weights_bytes, *(file.bytes for file in model.files)]
    counts += [number for name in _COUNTS if (number := getattr(model, name)) is not None]
    if not 1 <= model.layers <= _MOST_LAYERS or model.passes < 1 or min(counts) < 0:
        most = f"{_MOST_LAYERS} at most"
        return f"layers ({most}) and passes must be at least 1, and no other number negative"
    if (model.experts_used or 0) > (model.experts or 0):
        return f"experts_used is {model.experts_used} of {model.experts or 0} experts"
    part = (model.expert_bytes or 0) + (model.embedding_bytes or 0)
    if part > model.weights_bytes or (model.active_parameters or 0) > model.parameters:
        return "a part of the weights is larger than all of them"
    return None if model.kv is None else _wrong_kv(model.kv, model.layers)


def _wrong_kv(kv: KvLayout, layers: int) -> str | None:
    """Return the contradiction in the layout of a KV cache; None if there is none."""
    if len(kv.kv_heads) != layers:
        return f"kv.kv_heads has {len(kv.kv_heads)} entries for {layers} layers"
    if kv.sliding and len(kv.sliding) != layers:
        return f"kv.sliding has {len(kv.sliding)} entries for {layers} layers"
    if kv.sliding_layers != sum(kv.sliding):
        return f"kv.sliding_layers is {kv.sliding_layers}, kv.sliding has {sum(kv.sliding)}"
    numbers = [*kv.kv_heads, *(getattr(kv, name) or 0 for name in _KV_COUNTS)]
    return "kv must not hold negative numbers" if min(numbers) < 0 else None


_READERS: Final[dict[str, Callable[[str], Model]]] = {
    "file": read_gguf,
    "dir": read_folder,
    "catalogue": read_catalogue,
    "facts": _read_facts,
}
