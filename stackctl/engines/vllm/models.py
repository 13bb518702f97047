"""Models that vLLM cannot serve here, and those that need other kernels on some GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from stackctl.values.host import Gpu
from stackctl.values.model import Model

#: Classes of models that vLLM loads to embed or to classify.
_NO_TEXT: Final = re.compile(
    r".*(?:For(?:Sequence|Token|Image)Classification|ForMaskedLM|Bert\w*Model|RobertaModel)"
)
#: The GPUs on which some nvfp4 kernels compute wrongly, or not at all: RTX PRO 6000 and RTX 50
#: (Blackwell, except the GPUs for data centres).
_SM_120: Final = "12.0"
#: Kernels that compute in 16 bits.
_MARLIN: Final = "marlin"


def cannot_run(model: Model) -> str | None:
    """Return the reason why vLLM cannot serve a model; None if it can."""
    if model.format == "gguf":
        return "GGUF is not served by vLLM here; use llama.cpp or the safetensors checkpoint"
    if _NO_TEXT.fullmatch(model.architecture):
        return f"{model.architecture} embeds or classifies: it writes no text"
    return None


def fallback_kernels(model: Model, gpus: Sequence[Gpu]) -> tuple[tuple[str, str], ...]:
    """Return options (name, value) for other kernels of a model on these GPUs; empty for none."""
    if not model.is_nvfp4 or not gpus:
        return ()
    if any(gpu.compute_capability != _SM_120 for gpu in gpus):
        return ()
    names = ("linear-backend", "moe-backend") if model.experts else ("linear-backend",)
    return tuple((name, _MARLIN) for name in names)
