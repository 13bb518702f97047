"""The figures of a cell, computed from its answers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

from stackctl.engines import ENGINES
from stackctl.observe.bench.load_generator import CellRun, StreamedCompletion
from stackctl.observe.bench.statistics import quantiles
from stackctl.values.bench import BenchCell, RequestSample
from stackctl.values.profile import Slo

#: A speed needs at least so many tokens.
SPEED_TOKENS = 64
#: A length that differs from the wanted one by more than this share gives a note.
_OFF = 0.02
#: If there are fewer pieces than this share of the tokens, the gaps are not those between tokens.
_SPLIT = 0.9


def summarize_cell(run: CellRun, *, slo: Slo | None, parameters: int | None) -> BenchCell:
    """Return the figures of a cell; ``parameters`` is the size of the model (None: unknown)."""
    good = [completion for completion in run.replies if completion.error is None]
    seconds = run.ended - run.began
    speeds = quantiles(filter(None, map(generation_tok_s, good)))
    tokens = sum(completion.output_tokens or 0 for completion in good)
    factor = None
    if speeds is not None and parameters:
        factor = speeds.p50 / (parameters / 1e9)
    return BenchCell(
        shape=run.shape,
        requests=len(run.replies),
        failed=len(run.failed),
        seconds=seconds,
        prompt_tokens=_mean(completion.prompt_tokens for completion in good),
        output_tokens=_mean(completion.output_tokens for completion in good),
        cached_tokens=_mean(completion.cached_tokens for completion in good),
        ttft_s=quantiles(completion.ttft_s for completion in good if completion.ttft_s is not None),
        itl_ms=quantiles(itertools.chain.from_iterable(map(gaps_ms, good))),
        generation_tok_s=speeds,
        prompt_tok_s=quantiles(filter(None, map(_prompt_tok_s, good))),
        e2e_s=quantiles(completion.ended_s for completion in good),
        output_tok_s=tokens / seconds if tokens >= SPEED_TOKENS and seconds > 0 else None,
        goodput=_goodput(run.replies, slo),
        performance_factor=factor,
        notes=tuple(_notes(run, good)),
    )


def to_sample(completion: StreamedCompletion, number: int, origin: float) -> RequestSample:
    """Return a request as it is stored.

    ``number`` is the index of its cell, ``origin`` the start of the run on the clock of the reply.
    """
    return RequestSample(
        cell=number,
        began_s=completion.began - origin,
        e2e_s=completion.ended_s,
        ttft_s=completion.ttft_s,
        gaps_ms=gaps_ms(completion),
        prompt_tokens=completion.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        output_tokens=completion.output_tokens,
        generation_tok_s=generation_tok_s(completion),
        error=completion.error,
    )


def gaps_ms(completion: StreamedCompletion) -> tuple[float, ...]:
    """Return the milliseconds between the pieces of an answer."""
    pairs = itertools.pairwise(completion.moments)
    return tuple((after - before) * 1000 for before, after in pairs)


def generation_tok_s(completion: StreamedCompletion) -> float | None:
    """Return tokens per second after the first piece; None for fewer than 64 tokens or one piece.

    All pieces are taken to hold the same number of tokens, which is one for most engines.
    """
    tokens, pieces = completion.output_tokens or 0, len(completion.moments)
    if tokens < SPEED_TOKENS or pieces < 2:
        return None
    # A last token without text shows only in the time of the end.
    last = max(completion.moments[-1], completion.finished_s or 0.0)
    passed = last - completion.moments[0]
    return tokens * (1 - 1 / max(pieces, 2)) / passed if passed > 0 else None


def _prompt_tok_s(completion: StreamedCompletion) -> float | None:
    computed = (completion.prompt_tokens or 0) - (completion.cached_tokens or 0)
    if computed < SPEED_TOKENS or not completion.ttft_s:
        return None
    return computed / completion.ttft_s


def meets_slo(completion: StreamedCompletion, slo: Slo) -> bool:
    """Return True if a request met the SLO with its first token, its mean gap and its speed.

    The first token is ignored if the prompt is longer than the SLO's. A failed request never meets
    the SLO.
    """
    if completion.error is not None or completion.ttft_s is None:
        return False
    promised = (completion.prompt_tokens or 0) <= slo.prompt_tokens * (1 + _OFF)
    if slo.ttft_s is not None and promised and completion.ttft_s > slo.ttft_s:
        return False
    gaps = gaps_ms(completion)
    if slo.itl_ms is not None and gaps and statistics.fmean(gaps) > slo.itl_ms:
        return False
    speed = generation_tok_s(completion)
    return slo.min_tok_s is None or speed is None or speed >= slo.min_tok_s


def _goodput(replies: Sequence[StreamedCompletion], slo: Slo | None) -> float | None:
    if slo is None or not replies or (slo.ttft_s, slo.itl_ms, slo.min_tok_s) == (None,) * 3:
        return None
    return sum(meets_slo(completion, slo) for completion in replies) / len(replies)


def _notes(run: CellRun, good: Sequence[StreamedCompletion]) -> Iterable[str]:
    shape = run.shape
    if failed := run.failed:
        yield f"{len(failed)} of {len(run.replies)} requests failed: {failed[0].error}"
    if not good:
        return
    if any(completion.output_tokens is None for completion in good):
        yield "the server does not count tokens (no usage): no speeds"
    prompts = _mean(completion.prompt_tokens for completion in good)
    answers = _mean(completion.output_tokens for completion in good)
    for name, asked, got in (
        ("prompts", shape.prompt_tokens, prompts),
        ("answers", shape.output_tokens, answers),
    ):
        if got is not None and abs(got - asked) > _OFF * asked:
            yield f"{name} had {got:,.0f} tokens, asked for were {asked:,}"
    pieces, tokens = sum(len(r.moments) for r in good), sum(r.output_tokens or 0 for r in good)
    if tokens and pieces < _SPLIT * tokens:
        yield f"{tokens / max(1, pieces):.1f} tokens a piece: gaps are between pieces"
    cached = _mean(completion.cached_tokens for completion in good)
    if shape.cached and cached is None:
        known = ((one.title, one.advice.cached_tokens_option) for one in ENGINES.values())
        options = ", ".join(f"{title}: --{option}" for title, option in known if option)
        yield f"the server does not tell cached tokens ({options})"
    if not shape.cached and cached is not None and cached > 0.1 * shape.prompt_tokens:
        yield f"{cached:,.0f} tokens of each prompt were cached, though no two are alike"


def _mean(values: Iterable[int | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None
