"""Places of a model's files on the host and in the engine's container, and its name in the API."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stackctl.values.model import Model

#: A snapshot in the layout of the hub's cache. Its files are links to blobs of the same repository,
#: so the repository's folder is mounted.
_SNAPSHOT = re.compile(r"(?P<repo>.+/models--[^/]+)/(?P<inside>snapshots/(?P<commit>[0-9a-f]{40}))")
MODELS = "/models"


def model_mounts(model: Model) -> tuple[tuple[str, str], ...]:
    """Return the read-only mounts: path on the host and path in the container."""
    if model.folder is None:
        return tuple((file.path, f"{MODELS}/{file.file_name}") for file in model.files)
    match = _SNAPSHOT.fullmatch(model.folder)
    return ((match["repo"] if match else model.folder, MODELS),)


def model_path(model: Model) -> str:
    """Return the path that the engine loads; without files the repository's name, for plans."""
    if model.folder is not None:
        match = _SNAPSHOT.fullmatch(model.folder)
        return f"{MODELS}/{match['inside']}" if match else MODELS
    if model.format == "safetensors":
        name = model.source.partition(":")[2]
        return name if model.source.startswith(("hf:", "catalogue:")) else MODELS
    name = model.files[0].file_name if model.files else f"{model.architecture}.gguf"
    return f"{MODELS}/{name}"


def served_name(model: Model) -> str:
    """Return the model's name in the API: the file's name without ending and shard number; else
    the last part of the source."""
    if not model.files or model.format == "safetensors":
        name = re.split(r"[/:@]", model.source.removeprefix("hf:").partition("@")[0])[-1]
        return name.lower()
    stem = model.files[0].file_name.removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)


def file_outside_mounts(model: Model, paths: Iterable[str]) -> str | None:
    """Return the first of a checkpoint's files (real paths) that no mount holds; None if all are
    mounted."""
    roots = tuple(f"{source}/" for source, _ in model_mounts(model))
    return next((path for path in paths if not path.startswith(roots)), None)


def snapshot_commit(model: Model) -> str | None:
    """Return the hub's commit of a checkpoint's files; None outside the hub's cache."""
    match = _SNAPSHOT.fullmatch(model.folder or "")
    return match["commit"] if match else None
