"""Metrics of running engines: CPU time, counters, histograms, and speeds from their logs.

Unknown is None or an empty tuple, never 0.
"""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

#: An engine works if it uses at least this share of one CPU. A sleeping engine uses none, and
#: Podman's health check about 0.01, measured over five seconds. 0.05 is well above that, and low
#: enough for an engine that gets little time among many busy programs. The health check in the
#: container (units/healthcheck.py) computes its number of clock ticks from this share.
WORKING_SHARE = 0.05


def is_working(cpu_s: float, interval_s: float) -> bool:
    """Return True if a process that used ``cpu_s`` seconds of CPU time in an interval works."""
    return cpu_s >= WORKING_SHARE * interval_s


class Histogram(Value, frozen=True, kw_only=True):
    """A Prometheus histogram. ``buckets`` are pairs of an upper bound and a cumulative count.

    The bounds rise; the infinite bound is left out, because its count is ``count``. ``sum`` is the
    sum of all values.
    """

    buckets: tuple[tuple[float, float], ...] = ()
    count: float = 0.0
    sum: float = 0.0

    @property
    def mean(self) -> float | None:
        """Return the mean of all values; None if there are no values."""
        return self.sum / self.count if self.count > 0 else None

    def quantile(self, share: float) -> float | None:
        """Return a quantile, interpolated in its bucket as by Prometheus' histogram_quantile.

        Return the last bound if the quantile lies above it, None if there are no values.
        """
        if self.count <= 0 or not self.buckets:
            return None
        rank, low, below = share * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= rank and count > below:
                return low + (bound - low) * max(0.0, rank - below) / (count - below)
            low, below = bound, max(below, count)
        return self.buckets[-1][0]

    def since(self, earlier: Histogram | None) -> Histogram:
        """Return the values since an earlier reading; all values if the engine was restarted."""
        if earlier is None or earlier.count > self.count:
            return self
        before = dict(earlier.buckets)
        return Histogram(
            buckets=tuple((b, max(0.0, n - before.get(b, 0.0))) for b, n in self.buckets),
            count=self.count - earlier.count,
            sum=max(0.0, self.sum - earlier.sum),
        )


class EngineMetrics(Value, frozen=True, kw_only=True):
    """One reading of an engine's metrics. Counters count from its start.

    ``kv_usage`` is a share (0 to 1) of ``kv_capacity_tokens``. ``prompt_tokens`` were computed;
    ``cached_tokens`` were in the prefix cache, whose queries and hits count tokens too.
    ``prompt_s`` and ``generation_s`` are summed over requests. ``steps`` counts passes through the
    model. ``longest_tokens`` is the longest sequence so far. Histograms are in seconds, those of
    ``prompt_lengths`` and ``output_lengths`` in tokens. ``estimates`` names the fields that
    stackctl derived because the engine does not report them.
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
        """Return the counters of work; at least one of them rises while requests are computed."""
        return self.prompt_tokens, self.generation_tokens, self.steps, self.finished


class LogWindow(Value, frozen=True, kw_only=True):
    """A log line with averages over the ``seconds`` before it.

    Speeds are tokens per second of all requests together; cached prompt tokens do not count.
    ``at_s`` is the log's own clock, with an arbitrary zero. Shares are 0 to 1; the hit rate covers
    the last 1,000 requests.
    """

    at_s: float | None = None
    seconds: float
    prompt_tok_s: float
    generation_tok_s: float
    running: int
    waiting: int
    kv_usage: float | None = None
    hit_rate: float | None = None


class LoggedRequest(Value, frozen=True, kw_only=True):
    """One request in a log; its progress so far if it is not ``finished``.

    ``prompt_tokens`` were computed in ``prompt_s`` seconds, ``cached_tokens`` were in the cache.
    ``length`` is the length of the whole sequence: prompt with its cached part, and answer.
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
        """Return tokens per second after the first one, which the pass over the prompt produces."""
        if not self.generation_s or self.generated_tokens is None or self.generated_tokens < 2:
            return None
        return (self.generated_tokens - 1) / self.generation_s

    @property
    def prompt_tok_s(self) -> float | None:
        """Return the computed prompt tokens per second."""
        if not self.prompt_s or not self.prompt_tokens:
            return None
        return self.prompt_tokens / self.prompt_s


class LogSamples(Value, frozen=True, kw_only=True):
    """Speeds in a log, oldest first, and facts of the engine that wrote it.

    An engine logs one of two kinds of samples: averages over a window, or single requests.

    ``known_lines`` counts the lines that were recognised as the engine's. ``place`` is the device
    of the KV cache, ``fallback`` the line that reports a missing GPU, ``threads`` the number of
    threads for generation, ``context`` the number of tokens that one request may use.
    """

    engine: str
    known_lines: int = 0
    windows: tuple[LogWindow, ...] = ()
    requests: tuple[LoggedRequest, ...] = ()
    place: Literal["GPU", "CPU"] | None = None
    fallback: str | None = None
    architecture: str | None = None
    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    kv_capacity_tokens: int | None = None
    preemptions: int = 0


class StackMetrics(Value, frozen=True, kw_only=True):
    """The metrics of one stack: its state, the engine's own metrics, and estimates beside them.

    ``since_s`` is the seconds since the engine's start, ``restarts`` the number of restarts by
    systemd. ``checked`` is the status of the last check, ``checked_at`` its time in seconds since
    1970. ``drift`` counts the differences from the deployed state. ``ttft`` and ``token_time`` are
    estimates in seconds for the requests of this hour, from the log of an engine without
    histograms; they exclude waiting, and ``token_time`` counts the mean of each request.
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
