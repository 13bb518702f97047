"""The speeds of a running vLLM, from its counters."""

from __future__ import annotations

from typing import Final

from stackctl.engines.prometheus_text import Scrape
from stackctl.engines.protocol import MeasuredSpeeds, RunningCounters
from stackctl.errors import StackctlError

#: The fewest tokens from which a speed is computed.
_LEAST_TOKENS: Final = 64
_COUNTED: Final = ("count", "sum")


def parse_speeds(text: str) -> MeasuredSpeeds:
    """Return the speeds of one request at a time, over all requests since the start.

    Raises:
        StackctlError: too few tokens were generated or read so far.
    """
    seen = Scrape(text)

    def total(name: str) -> float:
        return seen.total(f"vllm:{name}") or 0.0

    tokens, seconds = (total(f"inter_token_latency_seconds_{k}") for k in _COUNTED)
    computed = total("prompt_tokens_total") - total("prompt_tokens_cached_total")
    prompts, prefill_s = (total(f"request_prefill_time_seconds_{k}") for k in _COUNTED)
    if tokens < _LEAST_TOKENS or seconds <= 0 or computed < _LEAST_TOKENS or prefill_s <= 0:
        raise StackctlError(
            f"too little to measure: {tokens:.0f} generated, {computed:.0f} prompt tokens so far",
            hint=f"send requests until there are {_LEAST_TOKENS} of each, then calibrate",
        )
    return MeasuredSpeeds(
        decode_tok_s=tokens / seconds,
        prefill_tok_s=computed / prefill_s,
        prompt_tokens=round(computed / max(1.0, prompts)),
    )


COUNTERS: Final = RunningCounters("/metrics", parse_speeds)
