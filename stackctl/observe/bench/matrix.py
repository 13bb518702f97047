"""Which cells a run measures: lengths of prompts and answers, requests at the same time, caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.bench.prompts import OWN_TOKENS
from stackctl.values.bench import Shape
from stackctl.values.profile import Slo

PROMPTS, OUTPUTS = (1024, 4096, 8192), (200, 400, 800)
#: Requests of a cell, and how many each of its streams makes at least.
REQUESTS, ROUNDS = 5, 2
#: A quick run: its prompt and answer, and seconds it is to take in all.
QUICK_PROMPT, QUICK_OUTPUT, QUICK_S = 512, 64, 50.0
QUICK_MOST = 20
#: Tokens of a context that are left free: templates differ by model.
_SPARE = 16
#: Shorter prompts say nothing of prompt speed.
_LEAST_PROMPT = 2 * OWN_TOKENS


@dataclass(frozen=True)
class Wish:
    """What the user asked for; what is None is chosen."""

    quick: bool = False
    prompts: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    concurrency: tuple[int, ...] | None = None
    requests: int | None = None
    prefix: str = "both"


@dataclass(frozen=True)
class Limits:
    """What the stack that runs can do: tokens of a request, and requests at the same time."""

    context: int
    slots: int


def shapes(wish: Wish, limits: Limits, slo: Slo | None) -> tuple[Shape, ...]:
    """The cells of a run, cheap ones first.

    Lengths that were not asked for are cut to what the context holds. What the SLO promises is for
    a length of its own, which is measured too.

    Raises:
        StackctlError: exit 2 when a length that was asked for does not fit.
    """
    outputs = wish.outputs or ((QUICK_OUTPUT,) if wish.quick else OUTPUTS)
    prompts = _prompts(wish, limits, outputs, slo)
    levels = wish.concurrency or _levels(limits.slots, quick=wish.quick)
    found = []
    if wish.prefix != "cached":
        for level in levels:
            # A quick run shows what many at once cost at one length only.
            some = prompts[:1] if wish.quick and level > 1 and not wish.prompts else prompts
            found += [Shape(prompt_tokens=p, output_tokens=o, concurrency=level)
                      for p in some for o in outputs]  # fmt: skip
    if wish.prefix != "uncached":
        some = prompts[:1] if wish.quick and not wish.prompts else prompts
        alone = levels if wish.prefix == "cached" else levels[:1]
        found += [Shape(prompt_tokens=p, output_tokens=outputs[0], concurrency=level, cached=True)
                  for level in alone for p in some]  # fmt: skip
    return tuple(found)


def requests(wish: Wish, shape: Shape, *, seconds: float, cells: int) -> int:
    """How many requests a cell makes; ``seconds`` is what one is expected to take."""
    if wish.requests is not None:
        return max(wish.requests, shape.concurrency)
    rounds = ROUNDS
    if wish.quick:
        affordable = QUICK_S / cells * shape.concurrency / max(seconds, 1e-3)
        count, rounds = round(min(affordable, QUICK_MOST)), 1
    else:
        count = REQUESTS
    # Whole rounds: at the end all streams are busy as long as possible.
    return max(rounds, -(-count // shape.concurrency)) * shape.concurrency


def _prompts(
    wish: Wish, limits: Limits, outputs: Sequence[int], slo: Slo | None
) -> tuple[int, ...]:
    most = limits.context - max(outputs) - _SPARE
    asked = wish.prompts or ()
    if most < _LEAST_PROMPT or (asked and max(asked) > most):
        raise StackctlError(
            f"a prompt of {max(asked or (_LEAST_PROMPT,)):,} and an answer of {max(outputs):,} "
            f"tokens do not fit the context of {limits.context:,}",
            hint=f"shorter ones: --prompt {max(1, most)} at most, or a smaller --output",
            exit_code=ExitCode.USAGE,
        )
    if asked:
        return asked
    usual = [QUICK_PROMPT] if wish.quick else [*PROMPTS]
    if slo is not None and slo.ttft_s is not None:
        usual.append(slo.prompt_tokens)
    return tuple(sorted({min(length, most) for length in usual}))


def _levels(slots: int, *, quick: bool) -> tuple[int, ...]:
    doubled = [2**power for power in range(13) if 2**power < slots] + [slots]
    return tuple(dict.fromkeys((1, slots))) if quick else tuple(doubled)
