"""Readers of logs, and the load of an engine and its speed, from three sources.

The sources are the log of the chosen time, two readings of the metrics while the engine works, and
the metrics since its start. Each number comes from the first source that has it. Prompts in a log
of windows are an exception: the windows also average over the time between prompts, so the metrics
since the start are preferred.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from stackctl.engines import ENGINES
from stackctl.values.diagnosis import Evidence
from stackctl.values.metrics import EngineMetrics, Histogram, LoggedRequest, LogSamples, LogWindow

#: A speed needs at least so many tokens.
_FEW_GENERATED, _FEW_PROMPT = 8, 32
_FEW_INTERVALS = 20
_RARE = 0.01


def read_log(lines: Iterable[str]) -> LogSamples | None:
    """Return the samples of a log.

    The engine that recognises the most of the log is taken for its author. Return None if no engine
    recognises a line.
    """
    readers = [engine.log_reader() for engine in ENGINES.values()]
    for line in lines:
        for reader in readers:
            reader.feed(line)
    found = [reader.samples() for reader in readers]
    best = max(found, key=lambda one: (len(one.windows) + len(one.requests), one.known_lines))
    return best if best.known_lines else None


def last_seconds(samples: LogSamples, since_s: float) -> LogSamples:
    """Return the samples of the last ``since_s`` seconds before the newest one, by the log's clock.

    Samples without a time are kept, because nothing shows that they are old.
    """
    every: tuple[LogWindow | LoggedRequest, ...] = (*samples.windows, *samples.requests)
    times = [one.at_s for one in every if one.at_s is not None]
    if not times:
        return samples
    first = max(times) - since_s
    return msgspec.structs.replace(
        samples,
        windows=tuple(one for one in samples.windows if one.at_s is None or one.at_s >= first),
        requests=tuple(one for one in samples.requests if one.at_s is None or one.at_s >= first),
    )


@dataclass(frozen=True)
class ValueRange:
    """The lowest, the highest and the typical of some numbers."""

    low: float
    high: float
    typical: float

    @staticmethod
    def of(values: Sequence[float], typical: Sequence[float] = ()) -> ValueRange | None:
        """Return the span of values; None without values.

        The typical value is the median of ``typical``, or of all values if that is empty.
        """
        if not values:
            return None
        return ValueRange(min(values), max(values), statistics.median(typical or values))


@dataclass(frozen=True)
class LoadSummary:
    """The load and the speed of an engine; None: unknown.

    Speeds are in tokens per second: ``generation`` for one request, ``prompt`` for the engine.
    ``generation_samples`` counts the samples of ``generation``; ``apart``: no prompts were computed
    in between. ``prompt_share`` is the share of prompts in the busy time (``at_most``: an upper
    bound). ``waiting_share`` is the share of busy samples with waiting requests, ``queue_share``
    the share of the requests' time that they waited. ``concurrency`` is the typical number of
    requests at once. ``prompt_tokens`` are those of one request, ``all_prompt_tokens`` all computed
    ones. ``kv_most`` and ``waiting_most`` are the highest values. ``longest`` is the longest
    sequence in tokens. ``ttft_s`` is the 95th percentile (``ttft_computed``: prompt time without
    waiting).
    """

    busy: bool | None = None
    generation: ValueRange | None = None
    generation_samples: int = 0
    apart: bool | None = None
    prompt: ValueRange | None = None
    prompt_share: float | None = None
    at_most: bool | None = None
    concurrency: float | None = None
    waiting_most: int | None = None
    waiting_share: float | None = None
    queue_share: float | None = None
    kv_most: float | None = None
    preemptions: float | None = None
    hits: ValueRange | None = None
    prompt_tokens: float | None = None
    all_prompt_tokens: float | None = None
    answer_tokens: float | None = None
    requests: int | None = None
    longest: int | None = None
    ttft_s: float | None = None
    ttft_computed: bool | None = None


#: Fields that belong together, and so must come from one source.
_TOGETHER = (
    ("generation", "generation_samples", "apart"),
    ("prompt_share", "at_most"),
    ("ttft_s", "ttft_computed"),
    ("answer_tokens", "requests"),
    ("hits", "all_prompt_tokens"),
)
_LARGEST = ("kv_most", "waiting_most", "longest", "preemptions")


def summarize_load(evidence: Evidence) -> LoadSummary:
    """Return the load, combined from all sources of the evidence."""
    log = evidence.log
    windows = _of_windows(log) if log and log.windows else LoadSummary()
    requests = LoadSummary()
    if log and log.requests:
        capacity = evidence.now.kv_capacity_tokens if evidence.now else None
        requests = _of_requests(log, capacity)
    life = _of_life(evidence.now) if evidence.now else LoadSummary()
    if life.prompt_share is not None:
        windows = dataclasses.replace(windows, prompt=None, prompt_share=None)
    return _together((requests, windows, _of_looks(evidence), life))


def _together(sources: Sequence[LoadSummary]) -> LoadSummary:
    values: dict[str, object] = {}
    for field in dataclasses.fields(LoadSummary):
        told = [v for v in (getattr(one, field.name) for one in sources) if v is not None]
        if field.name == "busy":
            values["busy"] = any(told) if told else None
        elif field.name in _LARGEST:
            values[field.name] = max(told, default=None)
        elif told:
            values[field.name] = told[0]
    for first, *rest in _TOGETHER:
        source = next((one for one in sources if getattr(one, first) is not None), LoadSummary())
        values.update({name: getattr(source, name) for name in rest})
    return LoadSummary(**values)  # type: ignore[arg-type]


def _of_windows(log: LogSamples) -> LoadSummary:
    """Summarise averages over windows. A window's running requests are those at its end."""
    windows = log.windows
    active = [w for w in windows if w.generation_tok_s > 0 or w.prompt_tok_s > 0]
    waits = [w for w in windows if w.running > 0 or w.waiting > 0]
    hits = [w.hit_rate for w in active if w.hit_rate is not None]
    running = [w for w in active if w.running > 0]
    rates = [(w, w.generation_tok_s / w.running) for w in running if w.generation_tok_s > 0]
    alone = [rate for w, rate in rates if w.prompt_tok_s == 0]
    prompts = [w.prompt_tok_s for w in active if w.prompt_tok_s > 0]
    return LoadSummary(
        busy=bool(active) or bool(waits),
        generation=ValueRange.of([rate for _, rate in rates], alone),
        generation_samples=len(alone) or len(rates),
        apart=bool(alone),
        prompt=ValueRange.of(prompts),
        # The best window's average stands for the speed of all prompts. The true speed is higher.
        prompt_share=_ratio(sum(prompts) / max(prompts, default=1.0), len(active)),
        at_most=True,
        concurrency=statistics.median([w.running for w in running]) if running else None,
        waiting_most=max((w.waiting for w in windows), default=None),
        waiting_share=_ratio(sum(w.waiting > 0 for w in waits), len(waits)),
        kv_most=max((w.kv_usage for w in windows if w.kv_usage is not None), default=None),
        preemptions=float(log.preemptions) if log.preemptions else None,
        # The rate is a running mean: its last value covers the most requests.
        hits=ValueRange.of(hits, hits[-1:]),
        all_prompt_tokens=sum(w.prompt_tok_s * w.seconds for w in active),
    )


def _of_requests(log: LogSamples, capacity: int | None) -> LoadSummary:
    """Summarise timings of single requests; ``capacity`` is that of the KV cache, in tokens."""
    seen = log.requests
    rates = _known(
        one.generation_tok_s for one in seen if (one.generated_tokens or 0) >= _FEW_GENERATED
    )
    speeds = _known(one.prompt_tok_s for one in seen if (one.prompt_tokens or 0) >= _FEW_PROMPT)
    prompt_s = sum(one.prompt_s or 0.0 for one in seen)
    generation_s = sum(one.generation_s or 0.0 for one in seen)
    done = [one for one in seen if one.finished]
    # A client that gave up before the first token had no answer, so it must not lower the mean.
    answers = [one.generated_tokens for one in done if one.generated_tokens]
    longest = max((one.length for one in done if one.length is not None), default=None)
    with_cache = [one for one in done if one.cached_tokens is not None]
    computed = sum(one.prompt_tokens or 0 for one in with_cache)
    cached = sum(one.cached_tokens or 0 for one in with_cache)
    whole = computed + cached
    return LoadSummary(
        busy=bool(seen),
        generation=ValueRange.of(rates),
        generation_samples=len(rates),
        apart=True,
        prompt=ValueRange.of(speeds),
        prompt_share=_ratio(prompt_s, prompt_s + generation_s),
        at_most=False,
        kv_most=min(1.0, longest / capacity) if longest and capacity else None,
        hits=ValueRange.of([_hit_rate(one) for one in with_cache], [cached / whole])
        if whole
        else None,
        prompt_tokens=whole / len(with_cache) if whole else None,
        all_prompt_tokens=computed,
        answer_tokens=statistics.mean(answers) if answers else None,
        requests=len(answers) if answers else None,
        longest=longest,
        ttft_s=_percentile([one.prompt_s for one in done if one.prompt_s is not None], 0.95),
        ttft_computed=True,
    )


def _hit_rate(one: LoggedRequest) -> float:
    cached, computed = one.cached_tokens or 0, one.prompt_tokens or 0
    return cached / (cached + computed) if cached + computed else 0.0


def _of_looks(evidence: Evidence) -> LoadSummary:
    """Summarise the two readings of the metrics, and their changes while requests ran."""
    before, now, passed_s = evidence.before, evidence.now, evidence.interval_s
    looks = [look for look in (before, now) if look is not None and now is not None]
    running = [look.running for look in looks if look.running is not None]
    waiting = [look.waiting for look in looks if look.waiting is not None]
    kv = [look.kv_usage for look in looks if look.kv_usage is not None]
    load = LoadSummary(
        busy=any(running) or any(waiting) or None,
        kv_most=max(kv, default=None),
        waiting_most=max(waiting, default=None),
    )
    if now is None or before is None or not passed_s or not any(running):
        return load
    recent = _difference(now, before)
    generated, rate = recent.generation_tokens or 0.0, _pace(recent.itl)
    # A prompt in between would make generation look slower than it is.
    apart = rate is not None or not recent.prompt_tokens
    if rate is None and apart and min(running) >= 1:
        rate = generated / passed_s / statistics.mean(running)
    rates = [rate] if rate is not None and generated >= _FEW_GENERATED else []
    return dataclasses.replace(
        load,
        generation=ValueRange.of(rates),
        generation_samples=round(generated) if rates else 0,
        apart=apart,
        concurrency=statistics.mean(running),
        waiting_share=_ratio(sum(count > 0 for count in waiting), len(waiting)),
        preemptions=recent.preemptions or None,
        queue_share=_queue_share(recent.queue, recent.e2e),
    )


def _pace(itl: Histogram | None) -> float | None:
    """Return tokens per second from the mean time between tokens; None for too few tokens."""
    if itl is None or itl.count < _FEW_INTERVALS or not itl.mean:
        return None
    return 1 / itl.mean


def _of_life(now: EngineMetrics) -> LoadSummary:
    """Summarise the numbers since the engine was started."""
    rate = _pace(now.itl) if now.itl else _ratio(now.generation_tokens, now.generation_s)
    speed = _ratio(now.prompt_tokens, now.prompt_s)
    hits = _ratio(now.prefix_hits, now.prefix_queries)
    return LoadSummary(
        busy=bool(now.generation_tokens),
        generation=ValueRange.of([rate] if rate else []),
        generation_samples=round(now.generation_tokens or 0) if rate else 0,
        apart=True,
        prompt=ValueRange.of([speed] if speed else []),
        prompt_share=_ratio(now.prompt_s, (now.prompt_s or 0.0) + (now.generation_s or 0.0)),
        at_most=False,
        queue_share=_queue_share(now.queue, now.e2e),
        kv_most=now.kv_usage,
        preemptions=_many_preemptions(now),
        hits=None if hits is None else ValueRange.of([hits]),
        prompt_tokens=now.prompt_lengths.mean if now.prompt_lengths else None,
        all_prompt_tokens=now.prompt_tokens,
        answer_tokens=now.output_lengths.mean if now.output_lengths else None,
        requests=(round(now.output_lengths.count) or None) if now.output_lengths else None,
        longest=now.longest_tokens or _longest(now.prompt_lengths, now.output_lengths),
        ttft_s=now.ttft.quantile(0.95) if now.ttft else None,
        ttft_computed=False,
    )


def _difference(now: EngineMetrics, before: EngineMetrics) -> EngineMetrics:
    """Return the increase of counters between two readings; other fields are as they are now."""
    values: dict[str, object] = {}
    for name in now.__struct_fields__:
        later, earlier = getattr(now, name), getattr(before, name)
        if isinstance(later, Histogram):
            values[name] = later.since(earlier)
        elif isinstance(later, float) and isinstance(earlier, float) and name != "kv_usage":
            values[name] = max(0.0, later - earlier)
        else:
            values[name] = later
    return EngineMetrics(**values)  # type: ignore[arg-type]


def _many_preemptions(now: EngineMetrics) -> float | None:
    """Return the number of preemptions, or 0 if they are below one in a hundred requests.

    So few cost next to nothing.
    """
    rare = now.finished is not None and (now.preemptions or 0.0) < _RARE * now.finished
    return 0.0 if rare and now.preemptions is not None else now.preemptions


def _queue_share(queue: Histogram | None, whole: Histogram | None) -> float | None:
    return queue.sum / whole.sum if queue and whole and whole.sum > 0 else None


def _longest(prompts: Histogram | None, answers: Histogram | None) -> int | None:
    """Return an upper bound of tokens in one sequence, from the highest buckets in use.

    Return None if a value lies above the last bound.
    """
    if not prompts or not answers or not prompts.count or not answers.count:
        return None
    if any(one.count > max((n for _, n in one.buckets), default=0) for one in (prompts, answers)):
        return None
    return round((prompts.quantile(1.0) or 0.0) + (answers.quantile(1.0) or 0.0))


def _ratio(part: float | None, whole: float | None) -> float | None:
    """Return the quotient of two numbers; None if either is unknown or the second is 0."""
    return part / whole if part is not None and whole else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value]


def _percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least a share of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]
