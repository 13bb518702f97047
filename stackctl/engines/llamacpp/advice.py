"""Advice that is llama.cpp's own, and the arguments that it depends on."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.engines.advice import Advice
from stackctl.engines.options import option_in_argv
from stackctl.values.diagnosis import Step

ADVICE = Advice(
    use_gpu=Step(
        do="use a GPU, if there is one, with llama.cpp too (--n-gpu-layers 999)",
        command="stackctl up gpu-gguf",
    ),
    large_batches={"batch-size": 2048, "ubatch-size": 2048},
    small_batches="--batch-size 512 --ubatch-size 128",
    cached_tokens_option=None,
    log_mark="print_timing",
)
#: Types of a KV cache of 8 bits or fewer begin with these: q8_0, q4_1, iq4_nl.
_FEW_BITS = ("q", "iq")


def locks_model(argv: Sequence[str]) -> bool:
    """See Engine: --load-mode, or --mlock of older builds."""
    return "--mlock" in argv or "mlock" in (option_in_argv(argv, "load-mode") or "")


def reduces_kv_cache(argv: Sequence[str]) -> bool:
    """See Engine."""
    return (option_in_argv(argv, "cache-type-k") or "").startswith(_FEW_BITS)


def is_quantization(method: str, reported: str) -> bool:
    """See Engine: its log names no method."""
    return method == reported.lower()
