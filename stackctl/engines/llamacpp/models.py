"""Models that llama-server cannot serve."""

from __future__ import annotations

from typing import Final

from stackctl.values.model import Model

#: Architectures that llama.cpp loads but whose models generate no text in llama-server.
_ENCODERS: Final = frozenset(
    {"bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed"}
    | {"modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder"}
)
_DIFFUSION: Final = frozenset({"diffusion-gemma", "dream", "llada", "llada-moe", "rnd1"})


def cannot_run(model: Model) -> str | None:
    """Return the reason why llama-server cannot serve a model; None if it can."""
    if model.format != "gguf":
        return "needs a GGUF"
    if model.passes > 1:
        return (
            f"a Loop variant, it asks for {model.passes} runs of all layers for a token; "
            "use the variant without Loop, or vLLM with the safetensors checkpoint"
        )
    does = "makes embeddings" if model.architecture in _ENCODERS else None
    does = "writes by diffusion" if model.architecture in _DIFFUSION else does
    if does is None:
        return None
    return f"a {model.architecture} model {does}: llama-server writes no text with it"
