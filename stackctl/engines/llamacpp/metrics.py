"""llama.cpp's speed: /metrics, /slots, a few lines of its log for each request, and llama-bench.

llama-server reports neither KV use nor histograms of latency; derived values are marked as
estimates. Texts are those of build 11669; older ones print timings without their task before each
line.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stackctl.engines.options import int_option_in_argv
from stackctl.engines.prometheus_text import Scrape
from stackctl.engines.protocol import Benchmark, MeasuredSpeeds
from stackctl.errors import StackctlError
from stackctl.values.metrics import EngineMetrics, LoggedRequest, LogSamples

_NUMBER = r"(\d{1,9}(?:\.\d{1,6})?)"
#: Minutes, seconds, milliseconds, microseconds since the start.
_CLOCK = re.compile(r"(?<![\d.])(\d{1,7})\.(\d\d)\.(\d{3})\.(\d{3}) [A-Z] ")
_TASK = re.compile(r"\bid\s{1,4}(\d{1,6}) \| task (-?\d{1,12}) \|")
_TIMING = re.compile(
    rf"\b(prompt eval|eval) time = {{1,12}}{_NUMBER} ms / {{1,12}}(\d{{1,9}}) tokens"
)
_PROMPT = re.compile(
    rf"prompt processing, n_tokens = {{1,9}}(\d{{1,9}}),.{{0,40}}?, t = {{1,9}}{_NUMBER} s"
)
_GENERATING = re.compile(rf"n_gen = {{1,9}}(\d{{1,9}}), tg = {{1,9}}{_NUMBER} t/s")
_RELEASE = re.compile(r"stop processing: n_(?:tokens|past) = (\d{1,9})")
_LAUNCH = re.compile(r"launch_slot_.{0,80}processing task")
_THREADS = re.compile(r"\bn_threads = (\d{1,6})\b")
_SLOTS = re.compile(r"n_slots = (\d{1,6})\b")
_CONTEXT = re.compile(r"n_ctx_(?:slot|seq) = (\d{1,9})\b")
_FALLBACK = re.compile(
    r"no usable GPU found|failed to initialize CUDA|no CUDA-capable device|"
    r"CUDA driver version is insufficient",
    re.IGNORECASE,
)
_OWN = re.compile(r"\b(?:srv|slot|cmn|que|llama_\w+|common_\w+|main|load_tensors)\b")
#: Each line that is read holds one of these words.
_WORDS = (" | task ", " tokens (", "srv ", "cmn ", "n_threads", "n_ctx", "n_slots", "GPU", "CUDA")
#: Tokens of prompt and of generation in one run of llama-bench: enough for a steady speed in a
#: short time.
PROMPT_TOKENS = 512
GENERATED_TOKENS = 64
#: Requests that are kept.
_MOST = 20000
_MOST_OPEN = 1024


def parse_metrics(answers: Mapping[str, str], argv: Sequence[str]) -> EngineMetrics:
    """See Engine.

    Its counters of tokens move when a request ends: the tokens of running slots are added. A slot's
    ``n_prompt_tokens`` are all its tokens so far, its answer too (seen with b11669).
    """
    seen = Scrape(answers.get("/metrics", ""))
    slots = [slot for slot in _slots(answers.get("/slots")) if slot.get("is_processing") is True]
    told = answers.get("/slots") is not None
    computed = seen.total("llamacpp:prompt_tokens_total")
    cached = seen.total("llamacpp:prompt_tokens_cached_total")
    generated = seen.total("llamacpp:tokens_predicted_total")
    capacity = int_option_in_argv(argv, "ctx-size") or None
    used = sum(_whole(slot.get("n_prompt_tokens")) for slot in slots) if told else None
    return EngineMetrics(
        running=seen.count("llamacpp:requests_processing"),
        waiting=seen.count("llamacpp:requests_deferred"),
        kv_usage=min(1.0, used / capacity) if used is not None and capacity else None,
        kv_capacity_tokens=capacity,
        prompt_tokens=computed,
        generation_tokens=None
        if generated is None
        else generated + sum(_decoded(slot) for slot in slots),
        cached_tokens=cached,
        prefix_queries=None if computed is None or cached is None else computed + cached,
        prefix_hits=cached,
        steps=seen.total("llamacpp:n_decode_total"),
        prompt_s=seen.total("llamacpp:prompt_seconds_total"),
        generation_s=seen.total("llamacpp:tokens_predicted_seconds_total"),
        longest_tokens=seen.count("llamacpp:n_tokens_max"),
        estimates=("kv_usage",) if used is not None and capacity else (),
    )


def _slots(text: str | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [slot for slot in found if isinstance(slot, dict)] if isinstance(found, list) else []


def _decoded(slot: Mapping[str, Any]) -> int:
    told = slot.get("next_token")
    token = told[0] if isinstance(told, list) and told else told
    return _whole(token.get("n_decoded")) if isinstance(token, dict) else 0


def _whole(value: object) -> int:
    return max(0, value) if isinstance(value, int) and not isinstance(value, bool) else 0


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
        raise StackctlError("llama-bench printed no speeds for prompt and generation")
    return MeasuredSpeeds(
        decode_tok_s=found["generation"],
        prefill_tok_s=found["prompt"],
        prompt_tokens=PROMPT_TOKENS,
    )


BENCHMARK = Benchmark("llama-bench", bench_arguments, parse_speeds)


class RequestReader:
    """See LogReader."""

    def __init__(self) -> None:
        self._done: deque[LoggedRequest] = deque(maxlen=_MOST)
        self._open: dict[tuple[str, str], LoggedRequest] = {}
        self._task: tuple[str, str] | None = None
        self._lines = 0
        self._fallback: str | None = None
        self._numbers: dict[str, int] = {}
        self._last_s: float | None = None
        self._starts_s = 0.0

    def feed(self, line: str) -> None:
        """See LogReader."""
        # Most lines match none of the patterns; a search for words is faster.
        if not any(word in line for word in _WORDS):
            return
        clock = _CLOCK.search(line)
        at_s = self._at(clock) if clock else self._last_s
        if match := _TASK.search(line):
            self._lines += 1
            self._task = (match[1], match[2])
            self._request(line, self._task, at_s)
        elif _TIMING.search(line) and self._task is not None:
            self._lines += 1
            self._request(line, self._task, at_s)
        elif clock or _OWN.search(line) or _FALLBACK.search(line):
            self._lines += clock is not None
            self._start(line)

    def samples(self) -> LogSamples:
        """See LogReader."""
        going = (one for one in self._open.values() if one.prompt_s is not None)
        return LogSamples(
            engine="llama.cpp",
            known_lines=self._lines,
            requests=(*self._done, *going),
            fallback=self._fallback,
            threads=self._numbers.get("threads"),
            slots=self._numbers.get("slots"),
            context=self._numbers.get("context"),
        )

    def _at(self, clock: re.Match[str]) -> float:
        """Return the engine's clock in seconds; a new start goes on where the last one ended."""
        minutes, seconds, milli, micro = (int(part) for part in clock.groups())
        at_s = self._starts_s + minutes * 60 + seconds + milli / 1e3 + micro / 1e6
        if self._last_s is not None and at_s < self._last_s - 1:
            # The engine was started anew, so no open request ends.
            self._open.clear()
            self._task = None
            self._starts_s += self._last_s
            at_s += self._last_s
        self._last_s = at_s
        return at_s

    def _request(self, line: str, task: tuple[str, str], at_s: float | None) -> None:
        if _LAUNCH.search(line):
            self._open.pop(task, None)
            if len(self._open) >= _MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[task] = LoggedRequest(at_s=at_s)
        elif match := _RELEASE.search(line):
            now = self._open.pop(task, None)
            if now is not None and now.prompt_tokens is not None:
                self._done.append(_finished(now, int(match[1]), at_s))
        else:
            self._open[task] = _progressed(self._open.get(task, LoggedRequest()), line, at_s)

    def _start(self, line: str) -> None:
        for name, pattern in (("threads", _THREADS), ("slots", _SLOTS), ("context", _CONTEXT)):
            if match := pattern.search(line):
                self._numbers[name] = int(match[1])
        if _FALLBACK.search(line):
            self._fallback = line.strip()[:200]


def _progressed(seen: LoggedRequest, line: str, at_s: float | None) -> LoggedRequest:
    """Return a request with the numbers of one more of its lines."""
    prompt = seen.prompt_tokens, seen.prompt_s
    answer = seen.generated_tokens, seen.generation_s
    for kind, ms, tokens in _TIMING.findall(line):
        spent = (int(tokens), float(ms) / 1000)
        prompt, answer = (prompt, spent) if kind == "eval" else (spent, answer)
    if match := _PROMPT.search(line):
        prompt = (int(match[1]), float(match[2]))
    if (match := _GENERATING.search(line)) and (speed := float(match[2])):
        answer = (int(match[1]), int(match[1]) / speed)
    return LoggedRequest(
        at_s=at_s, prompt_tokens=prompt[0], prompt_s=prompt[1], generated_tokens=answer[0],
        generation_s=answer[1],
    )  # fmt: skip


def _finished(seen: LoggedRequest, length: int, at_s: float | None) -> LoggedRequest:
    """Return a request at its end.

    ``length`` counts the tokens in the cache. It lacks the last token of the answer, because no
    further token was computed from it.
    """
    cached = None
    if seen.prompt_tokens is not None and seen.generated_tokens is not None:
        cached = max(0, length - seen.prompt_tokens - seen.generated_tokens + 1)
    return msgspec.structs.replace(
        seen, at_s=seen.at_s if at_s is None else at_s, cached_tokens=cached, length=length,
        finished=True,
    )  # fmt: skip
