"""The cells of a run: lengths of prompts and answers, concurrency, and cached prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.bench.prompts import OWN_TOKENS
from stackctl.values.bench import Workload
from stackctl.values.generation import EngineFact
from stackctl.values.plan import Plan
from stackctl.values.profile import Slo

PROMPTS, OUTPUTS = (1024, 4096, 8192), (200, 400, 800)
#: The requests of a cell, and the fewest requests of each of its streams.
REQUESTS, ROUNDS = 5, 2
#: A quick run: tokens of its prompts and answers, and its planned duration in seconds.
QUICK_PROMPT, QUICK_OUTPUT, QUICK_S = 512, 64, 50.0
QUICK_MOST = 20
#: The context if neither plan nor engine has a value.
_CONTEXT = 4096
#: Tokens of the context that stay free, because chat templates differ by model.
_SPARE = 16
#: Shorter prompts do not measure the prompt speed.
_LEAST_PROMPT = 2 * OWN_TOKENS


@dataclass(frozen=True)
class BenchOptions:
    """The options of the user. Options that are None are derived."""

    quick: bool = False
    prompts: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    concurrency: tuple[int, ...] | None = None
    requests: int | None = None
    prefix: str = "both"


@dataclass(frozen=True)
class Capacity:
    """The capacity of a stack: tokens of a request, and requests at the same time."""

    context: int
    slots: int


def serving_capacity(plan: Plan, report: Sequence[EngineFact]) -> Capacity:
    """Return the capacity by the plan's decisions, else by the facts that the engine reported."""
    engine = find_engine(plan.engine)
    said = {fact.name: _count(fact.value) for fact in report}
    chosen = {d.field: _count(d.value) for d in plan.decisions}
    slots = chosen.get(engine.requests_option) or said.get("slots") or 1
    context = chosen.get(engine.context_option)
    if context and engine.shares_context:
        # This applies to a shared cache too, because all slots may be in use at once.
        context //= slots
    return Capacity(context=context or said.get("context") or _CONTEXT, slots=slots)


def _count(value: object) -> int | None:
    """Return a whole number above zero; None for others, such as --parallel -1 (automatic)."""
    text = str(value)
    return int(text) or None if text.isdecimal() else None


def plan_cells(options: BenchOptions, limits: Capacity, slo: Slo | None) -> tuple[Workload, ...]:
    """Return the cells of a run, cheap ones first.

    Default lengths are cut to the context. If the SLO has a TTFT, its prompt length is added.

    Raises:
        StackctlError: exit 2 if a length of the user does not fit the context.
    """
    outputs = options.outputs or ((QUICK_OUTPUT,) if options.quick else OUTPUTS)
    prompts = _prompts(options, limits, outputs, slo)
    levels = options.concurrency or _levels(limits.slots, quick=options.quick)
    found = []
    if options.prefix != "cached":
        for level in levels:
            # A quick run measures concurrency at one length only.
            some = prompts[:1] if options.quick and level > 1 and not options.prompts else prompts
            found += [Workload(prompt_tokens=p, output_tokens=o, concurrency=level)
                      for p in some for o in outputs]  # fmt: skip
    if options.prefix != "uncached":
        some = prompts[:1] if options.quick and not options.prompts else prompts
        alone = levels if options.prefix == "cached" else levels[:1]
        found += [Workload(prompt_tokens=p, output_tokens=outputs[0], concurrency=level,
                cached=True)
                  for level in alone for p in some]  # fmt: skip
    return tuple(found)


def request_count(options: BenchOptions, workload: Workload, *, seconds: float, cells: int) -> int:
    """Return the number of requests of a cell.

    ``seconds`` is the expected time of one request, ``cells`` the number of cells in the run.
    """
    if options.requests is not None:
        return max(options.requests, workload.concurrency)
    rounds = ROUNDS
    if options.quick:
        affordable = QUICK_S / cells * workload.concurrency / max(seconds, 1e-3)
        count, rounds = round(min(affordable, QUICK_MOST)), 1
    else:
        count = REQUESTS
    # Round up to whole rounds, so that all streams are busy until shortly before the end.
    return max(rounds, -(-count // workload.concurrency)) * workload.concurrency


def _prompts(
    options: BenchOptions, limits: Capacity, outputs: Sequence[int], slo: Slo | None
) -> tuple[int, ...]:
    most = limits.context - max(outputs) - _SPARE
    asked = options.prompts or ()
    if most < _LEAST_PROMPT or (asked and max(asked) > most):
        raise StackctlError(
            f"a prompt of {max(asked or (_LEAST_PROMPT,)):,} and an answer of {max(outputs):,} "
            f"tokens do not fit the context of {limits.context:,}",
            hint=f"shorter ones: --prompt {max(1, most)} at most, or a smaller --output",
            exit_code=ExitCode.USAGE,
        )
    if asked:
        return asked
    usual = [QUICK_PROMPT] if options.quick else [*PROMPTS]
    if slo is not None and slo.ttft_s is not None:
        usual.append(slo.prompt_tokens)
    return tuple(sorted({min(length, most) for length in usual}))


def _levels(slots: int, *, quick: bool) -> tuple[int, ...]:
    doubled = [2**power for power in range(13) if 2**power < slots] + [slots]
    return tuple(dict.fromkeys((1, slots))) if quick else tuple(doubled)
