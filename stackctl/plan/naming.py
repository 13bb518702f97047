"""What a model is called: where the engine finds it, and in the API."""

from __future__ import annotations

import re

from stackctl.values.model import Model


def model_path(model: Model) -> str:
    """Where the engine finds the model: mounted files, or the name of a repository in the cache."""
    if model.format == "safetensors":
        name = model.source.partition(":")[2]
        return name if model.source.startswith(("hf:", "catalogue:")) else "/models"
    return f"/models/{_file_name(model)}"


def served_name(model: Model) -> str:
    """The file's name without ending and shard number; else the last part of the source."""
    if not model.files or model.format == "safetensors":
        name = re.split(r"[/:@]", model.source.removeprefix("hf:").partition("@")[0])[-1]
        return name.lower()
    stem = _file_name(model).removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)


def _file_name(model: Model) -> str:
    return model.files[0].path.rpartition("/")[2] if model.files else f"{model.architecture}.gguf"
