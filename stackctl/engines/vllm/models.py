"""Models that vLLM cannot serve here."""

from __future__ import annotations

import re
from typing import Final

from stackctl.values.model import Model

#: Classes of models that vLLM loads to embed or to classify.
_NO_TEXT: Final = re.compile(
    r".*(?:For(?:Sequence|Token|Image)Classification|ForMaskedLM|Bert\w*Model|RobertaModel)"
)


def cannot_run(model: Model) -> str | None:
    """Return the reason why vLLM cannot serve a model; None if it can."""
    if model.format == "gguf":
        return "GGUF is not served by vLLM here; use llama.cpp or the safetensors checkpoint"
    if _NO_TEXT.fullmatch(model.architecture):
        return f"{model.architecture} embeds or classifies: it writes no text"
    return None
