"""vLLM's speed, read from /metrics and a line of its log every ten seconds (0.32)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from stackctl.engines.prometheus_text import Scrape
from stackctl.engines.protocol import MeasuredSpeeds, RunningCounters
from stackctl.errors import StackctlError
from stackctl.values.metrics import EngineMetrics, LogSamples, LogWindow

_NUMBER = r"(\d{1,9}(?:\.\d{1,6})?)"
_WINDOW = re.compile(
    rf"Avg prompt throughput: {_NUMBER} tokens/s, Avg generation throughput: {_NUMBER} tokens/s, "
    r"Running: (\d{1,9}) reqs, Waiting: (\d{1,9}) reqs"
)
_KV = re.compile(rf"(GPU|CPU)? ?KV cache usage: {_NUMBER}\s?%")
_HITS = re.compile(rf"Prefix cache hit rate: {_NUMBER}\s?%")
#: Month, day and time of day; the log holds no year.
_CLOCK = re.compile(r"\b[A-Z]{4,8} (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\b")
_ARCHITECTURE = re.compile(r"Resolved architecture: (\w{1,80})")
_CAPACITY = re.compile(r"(GPU|CPU) KV cache size: ([\d,]{1,20}) tokens")
_CONTEXT = re.compile(r"\bmax_seq_len=(\d{1,9})\b")
_PREEMPTED = re.compile(r"is preempted|Preempted request")
_OWN = re.compile(r"\b(?:INFO|WARNING|ERROR|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[\w.]+:\d+\]")
#: Any leap year; only distances within a year matter.
_LEAP_YEAR = 2024
_YEAR_S = 366 * 86400
#: Default of VLLM_LOG_STATS_INTERVAL, in seconds.
_WINDOW_S = 10.0
#: Windows that are kept: one day.
_MOST = 8640
#: The fewest tokens from which a speed is computed.
_LEAST_TOKENS = 64
_COUNTED = ("count", "sum")


def parse_metrics(answers: Mapping[str, str], argv: Sequence[str]) -> EngineMetrics:  # noqa: ARG001
    """See Engine."""
    seen = Scrape(answers.get("/metrics", ""))
    cached = seen.total("vllm:prompt_tokens_cached_total")
    computed = seen.total("vllm:prompt_tokens_by_source_total", source="local_compute")
    if computed is None and (total := seen.total("vllm:prompt_tokens_total")) is not None:
        computed = max(0.0, total - (cached or 0.0))
    prefill = seen.histogram("vllm:request_prefill_time_seconds")
    decode = seen.histogram("vllm:request_decode_time_seconds")
    return EngineMetrics(
        running=seen.count("vllm:num_requests_running"),
        waiting=seen.count("vllm:num_requests_waiting"),
        kv_usage=seen.max_value("vllm:kv_cache_usage_perc"),
        kv_capacity_tokens=seen.int_label("vllm:cache_config_info", "kv_cache_size_tokens"),
        prompt_tokens=computed,
        generation_tokens=seen.total("vllm:generation_tokens_total"),
        cached_tokens=cached,
        prefix_queries=seen.total("vllm:prefix_cache_queries_total"),
        prefix_hits=seen.total("vllm:prefix_cache_hits_total"),
        preemptions=seen.total("vllm:num_preemptions_total"),
        finished=seen.total("vllm:request_success_total"),
        prompt_s=prefill.sum if prefill else None,
        generation_s=decode.sum if decode else None,
        ttft=seen.histogram("vllm:time_to_first_token_seconds"),
        itl=seen.histogram("vllm:inter_token_latency_seconds"),
        e2e=seen.histogram("vllm:e2e_request_latency_seconds"),
        queue=seen.histogram("vllm:request_queue_time_seconds"),
        prompt_lengths=seen.histogram("vllm:request_prompt_tokens"),
        output_lengths=seen.histogram("vllm:request_generation_tokens"),
    )


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


COUNTERS = RunningCounters("/metrics", parse_speeds)


class WindowReader:
    """See LogReader."""

    def __init__(self) -> None:
        self._windows: deque[LogWindow] = deque(maxlen=_MOST)
        self._lines = self._preemptions = 0
        self._place: Literal["GPU", "CPU"] | None = None
        self._architecture: str | None = None
        self._context: int | None = None
        self._capacity: int | None = None
        self._last_s: float | None = None
        self._years_s = 0.0

    def feed(self, line: str) -> None:
        """See LogReader."""
        # Most lines match neither pattern; a search for a word is faster.
        if "throughput: " in line and (match := _WINDOW.search(line)):
            self._lines += 1
            self._window(line, match)
            return
        if ".py:" not in line or not _OWN.search(line):
            return
        self._lines += 1
        if match := _ARCHITECTURE.search(line):
            self._architecture = match[1]
        if match := _CAPACITY.search(line):
            self._place = "GPU" if match[1] == "GPU" else "CPU"
            self._capacity = int(match[2].replace(",", "") or 0)
        if match := _CONTEXT.search(line):
            self._context = int(match[1])
        if _PREEMPTED.search(line):
            self._preemptions += 1

    def samples(self) -> LogSamples:
        """See LogReader."""
        return LogSamples(
            engine="vllm",
            known_lines=self._lines,
            windows=tuple(self._windows),
            place=self._place,
            architecture=self._architecture,
            context=self._context,
            kv_capacity_tokens=self._capacity or None,
            preemptions=self._preemptions,
        )

    def _window(self, line: str, match: re.Match[str]) -> None:
        kv, hits = _KV.search(line, match.end()), _HITS.search(line, match.end())
        if kv and kv[1]:
            self._place = "GPU" if kv[1] == "GPU" else "CPU"
        self._windows.append(
            LogWindow(
                at_s=self._clock(line[: match.start()]),
                seconds=_WINDOW_S,
                prompt_tok_s=float(match[1]),
                generation_tok_s=float(match[2]),
                running=int(match[3]),
                waiting=int(match[4]),
                kv_usage=float(kv[2]) / 100 if kv else None,
                hit_rate=float(hits[1]) / 100 if hits else None,
            )
        )

    def _clock(self, line: str) -> float | None:
        """Return the seconds since the first of January of the log's first year."""
        match = _CLOCK.search(line)
        if match is None:
            return None
        month, day, hour, minute, second = (int(part) for part in match.groups())
        try:
            at = datetime(_LEAP_YEAR, month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            return None
        at_s = (at - datetime(_LEAP_YEAR, 1, 1, tzinfo=UTC)).total_seconds()
        # A step back of half a year is a new year; a smaller one is a clock that was set.
        if self._last_s is not None and self._last_s - at_s > _YEAR_S / 2:
            self._years_s += _YEAR_S
        self._last_s = at_s
        return at_s + self._years_s
