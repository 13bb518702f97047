"""Attention and state of GGUF architectures where the file does not hold them.

The values are those of llama.cpp's code (src/models, src/llama-hparams.cpp): a GGUF file names its
architecture, and the engine adds the rest. Architectures are named as in ``general.architecture``.
"""

from __future__ import annotations

from typing import Final

#: Every n-th layer has full attention, the others a sliding window.
SLIDING_PERIODS: Final = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
#: Sliding windows in tokens.
WINDOWS: Final = {"gemma2": 4096, "llama4": 8192}
#: Architectures whose periods begin with the layer that has full attention.
FULL_FIRST: Final = frozenset({"smallthinker"})
#: Every n-th layer has attention, the others a recurrent state.
RECURRENT_PERIODS: Final = {"qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
#: Every layer has attention and a recurrent state.
PARALLEL_STATE: Final = frozenset({"falcon-h1"})
#: A layer without attention is recurrent only if it has no feed-forward part either.
LONE_LAYERS: Final = frozenset({"nemotron_h", "nemotron_h_moe"})
