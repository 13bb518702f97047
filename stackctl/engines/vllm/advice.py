"""Advice that is vLLM's own, and the arguments that it depends on."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.engines.advice import Advice
from stackctl.engines.options import option_in_argv
from stackctl.values.diagnosis import Step

ADVICE = Advice(
    use_gpu=Step(do="use a GPU, if there is one", command="stackctl up gpu-nvfp4"),
    large_batches={"max-num-batched-tokens": 16384},
    small_batches=None,
    cached_tokens_option="enable-prompt-tokens-details",
    log_mark="Avg generation throughput",
)
#: Methods whose names in vLLM's log do not begin with the method.
_ALSO_CALLED = {"compressed-tensors": "compressed"}


def locks_model(argv: Sequence[str]) -> bool:  # noqa: ARG001
    """See Engine: it has no option for that."""
    return False


def reduces_kv_cache(argv: Sequence[str]) -> bool:
    """See Engine: fp8, fp8_e4m3, fp8_e5m2."""
    return (option_in_argv(argv, "kv-cache-dtype") or "").startswith("fp8")


def is_quantization(method: str, reported: str) -> bool:
    """See Engine: "modelopt" is reported as "modelopt_fp4", "awq" as "awq_marlin"."""
    return reported.lower().startswith(_ALSO_CALLED.get(method, method))
