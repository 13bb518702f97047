"""Numbers of running engines: counters, histograms, and speeds from their logs.

Every field is None (or empty) where nothing is known; None is never a zero.
"""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class Histogram(Value, frozen=True, kw_only=True):
    """A Prometheus histogram: ``buckets`` are (upper bound, how many at most that large) by rising
    bound, without the infinite one, whose count is ``count``; ``sum`` is of all values."""

    buckets: tuple[tuple[float, float], ...] = ()
    count: float = 0.0
    sum: float = 0.0

    @property
    def mean(self) -> float | None:
        """The mean of all values; None when there are none."""
        return self.sum / self.count if self.count > 0 else None

    def quantile(self, share: float) -> float | None:
        """The value that a share of all is at most, interpolated within its bucket as Prometheus'
        histogram_quantile does; above the last bound that bound, None when there are no values."""
        if self.count <= 0 or not self.buckets:
            return None
        rank, low, below = share * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= rank and count > below:
                return low + (bound - low) * max(0.0, rank - below) / (count - below)
            low, below = bound, max(below, count)
        return self.buckets[-1][0]

    def since(self, earlier: Histogram | None) -> Histogram:
        """What came after an earlier look; all of it where the engine was restarted in between."""
        if earlier is None or earlier.count > self.count:
            return self
        before = dict(earlier.buckets)
        return Histogram(
            buckets=tuple((b, max(0.0, n - before.get(b, 0.0))) for b, n in self.buckets),
            count=self.count - earlier.count,
            sum=max(0.0, self.sum - earlier.sum),
        )


class EngineMetrics(Value, frozen=True, kw_only=True):
    """One look at an engine's own numbers. Counters run since its start.

    ``kv_usage`` is a share (0 to 1) of ``kv_capacity_tokens``. ``prompt_tokens`` were computed,
    ``cached_tokens`` were not because the prefix cache had them; queries and hits of that cache are
    tokens. ``prompt_s`` and ``generation_s`` are summed over requests. ``steps`` counts passes
    through the model. ``longest_tokens`` is the longest sequence so far. Histograms: seconds, of
    ``prompt_lengths`` and ``output_lengths`` tokens. ``estimates`` names the fields that the engine
    does not tell and that were derived here.
    """

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    kv_capacity_tokens: int | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    cached_tokens: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None
    preemptions: float | None = None
    finished: float | None = None
    steps: float | None = None
    prompt_s: float | None = None
    generation_s: float | None = None
    longest_tokens: int | None = None
    ttft: Histogram | None = None
    itl: Histogram | None = None
    e2e: Histogram | None = None
    queue: Histogram | None = None
    prompt_lengths: Histogram | None = None
    output_lengths: Histogram | None = None
    estimates: tuple[str, ...] = ()

    @property
    def counters(self) -> tuple[float | None, ...]:
        """The counters of which one moves at least while the engine works on requests."""
        return self.prompt_tokens, self.generation_tokens, self.steps, self.finished


class Window(Value, frozen=True, kw_only=True):
    """A line of a log with averages over the ``seconds`` before it.

    Speeds are tokens a second of all requests together, prompts without cached tokens. ``at_s`` is
    the log's own clock, from any zero. Shares are 0 to 1; the hit rate is that of the last 1,000
    requests.
    """

    at_s: float | None = None
    seconds: float
    prompt_tok_s: float
    generation_tok_s: float
    running: int
    waiting: int
    kv_usage: float | None = None
    hit_rate: float | None = None


class Request(Value, frozen=True, kw_only=True):
    """One request in a log; its progress so far where it is not ``finished``.

    ``prompt_tokens`` were computed in ``prompt_s`` seconds, ``cached_tokens`` were there already.
    ``length`` is the sequence in the end: prompt, cached part too, and answer.
    """

    at_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_s: float | None = None
    generated_tokens: int | None = None
    generation_s: float | None = None
    length: int | None = None
    finished: bool = False

    @property
    def generation_tok_s(self) -> float | None:
        """Tokens a second after the first one, which the prompt's pass gives."""
        if not self.generation_s or self.generated_tokens is None or self.generated_tokens < 2:
            return None
        return (self.generated_tokens - 1) / self.generation_s

    @property
    def prompt_tok_s(self) -> float | None:
        """Computed prompt tokens a second."""
        if not self.prompt_s or not self.prompt_tokens:
            return None
        return self.prompt_tokens / self.prompt_s


class LogSamples(Value, frozen=True, kw_only=True):
    """Speeds in a log, oldest first, and facts of the engine that wrote it.

    An engine logs one of two kinds of samples: averages over a window, or one request.

    ``known_lines`` counts lines in the engine's own words. ``place`` is where the KV cache lies,
    ``fallback`` the line that says that a GPU was wanted and not found, ``threads`` those of
    generation, ``context`` the tokens that one request may use.
    """

    engine: str
    known_lines: int = 0
    windows: tuple[Window, ...] = ()
    requests: tuple[Request, ...] = ()
    place: Literal["GPU", "CPU"] | None = None
    fallback: str | None = None
    architecture: str | None = None
    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    kv_capacity_tokens: int | None = None
    preemptions: int = 0


class StackMetrics(Value, frozen=True, kw_only=True):
    """What one stack does: its state, the engine's own numbers, and what they lack.

    ``since_s`` is how long the engine runs, ``restarts`` how often systemd started it again,
    ``checked`` the status of the last check and ``checked_at`` when it was, in seconds since 1970;
    ``drift`` counts what was changed by hand. ``ttft`` and ``token_time`` are seconds of the
    requests of this hour, read from the log of an engine that has no histograms: estimates, without
    the time that requests waited, ``token_time`` by a request's mean.
    """

    stack: str
    profile: str | None = None
    objective: str | None = None
    engine: str | None = None
    model: str | None = None
    generation: int | None = None
    state: str
    restarts: int | None = None
    since_s: float | None = None
    checked: str | None = None
    checked_at: float | None = None
    drift: int = 0
    numbers: EngineMetrics | None = None
    ttft: Histogram | None = None
    token_time: Histogram | None = None


class MetricsReport(Value, frozen=True, kw_only=True):
    """The document of ``stackctl metrics --json``."""

    schema: Literal["stackctl.metrics/1"] = "stackctl.metrics/1"
    scope: Literal["user", "system"]
    guard: bool | None = None
    stacks: tuple[StackMetrics, ...]
