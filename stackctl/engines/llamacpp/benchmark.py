"""llama-bench: the benchmark in llama.cpp's images, its arguments and its output."""

from __future__ import annotations

import json
from typing import Final

from stackctl.engines.protocol import Benchmark, MeasuredSpeeds
from stackctl.errors import StackctlError

PROGRAM: Final = "llama-bench"
#: Tokens of prompt and of generation in one run: enough for a steady speed in a short time.
PROMPT_TOKENS: Final = 512
GENERATED_TOKENS: Final = 64


def bench_arguments(model_path: str, threads: int) -> tuple[str, ...]:
    """Return the arguments of a run whose output is JSON."""
    return (
        "--model", model_path,
        "--threads", str(threads), "--n-prompt", str(PROMPT_TOKENS),
        "--n-gen", str(GENERATED_TOKENS), "--repetitions", "3", "--flash-attn", "1",
        "--output", "json",
    )  # fmt: skip


def parse_speeds(text: str) -> MeasuredSpeeds | None:
    """Return the speeds in the output; None for output that is not a list of runs.

    Raises:
        StackctlError: no speed for prompt or generation.
    """
    try:
        runs = json.loads(text)
    except ValueError:
        return None
    if not isinstance(runs, list):
        return None
    found = {
        "prompt" if run.get("n_prompt") else "generation": float(run["avg_ts"])
        for run in runs
        if isinstance(run, dict) and isinstance(run.get("avg_ts"), int | float)
    }
    if set(found) != {"prompt", "generation"} or min(found.values()) <= 0:
        raise StackctlError(f"{PROGRAM} printed no speeds for prompt and generation")
    return MeasuredSpeeds(
        decode_tok_s=found["generation"],
        prefill_tok_s=found["prompt"],
        prompt_tokens=PROMPT_TOKENS,
    )


BENCHMARK: Final = Benchmark(PROGRAM, bench_arguments, parse_speeds)
