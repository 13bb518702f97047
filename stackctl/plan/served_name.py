"""The name of a model in the API."""

from __future__ import annotations

import re

from stackctl.values.model import Model


def served_name(model: Model) -> str:
    """Return the file's name without ending and shard number; else the last part of the source."""
    if not model.files or model.format == "safetensors":
        name = re.split(r"[/:@]", model.source.removeprefix("hf:").partition("@")[0])[-1]
        return name.lower()
    stem = model.files[0].file_name.removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)
