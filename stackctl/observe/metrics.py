"""Prometheus metrics that engines do not export: the state of stacks, and estimates.

The estimates are the KV cache usage and the latencies of engines that report neither.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_generation
from stackctl.diagnose.load_summary import read_log
from stackctl.errors import StackctlError
from stackctl.observe import engine_snapshot
from stackctl.observe.status import status_report
from stackctl.values.generation import Generation
from stackctl.values.history import StackState, StackStatus
from stackctl.values.metrics import Histogram, LoggedRequest, MetricsReport, StackMetrics

#: The bounds of engines with their own histograms, so that one dashboard fits all engines.
TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_STATES: tuple[StackState, ...] = (
    "ready", "starting", "failed", "crash loop", "stopped", "not answering", "unknown",
)  # fmt: skip
_PATIENCE_S = 5.0
#: Far more lines than an engine logs in an hour.
_MOST_LINES = 200_000
_HOUR_S = 3600


def collect_metrics(context: Context, stacks: Sequence[str]) -> MetricsReport:
    """Return the metrics of several stacks."""
    found = status_report(context, stacks)
    return MetricsReport(
        scope=context.paths.scope,
        guard=found.guard,
        stacks=tuple(_stack(context, status) for status in found.stacks),
    )


def _stack(context: Context, status: StackStatus) -> StackMetrics:
    numbers = since_s = ttft = token_time = None
    if status.state == "ready":
        try:
            generation = installed_generation(context, status.stack)
            numbers, _ = engine_snapshot.scrape_metrics(generation, timeout_s=_PATIENCE_S)
            since_s = context.systemd.state(generation.units.service).running_s
            if numbers is not None and numbers.ttft is None and since_s is not None:
                # The hour limits the part of the log that is read. Prometheus takes the beginning
                # of an hour for a counter reset, which its functions expect.
                now = time.time()
                first = max(now - since_s, now - now % _HOUR_S)
                ttft, token_time = latencies_in_log(context, generation, first, _MOST_LINES)
        except StackctlError as error:
            # The fault of one stack must not hide the other stacks.
            context.progress.warn(error.message, error.hint)
    return StackMetrics(
        stack=status.stack,
        profile=status.profile,
        objective=status.objective,
        engine=status.engine,
        model=status.model,
        generation=status.generation,
        state=status.state,
        restarts=status.restarts,
        since_s=since_s,
        checked=status.health.status if status.health else None,
        checked_at=_moment(status.health.when) if status.health else None,
        drift=len(status.drift),
        numbers=numbers,
        ttft=ttft,
        token_time=token_time,
    )


def latencies_in_log(
    context: Context, generation: Generation, since: float, most_lines: int
) -> tuple[Histogram, Histogram]:
    """Return the histograms of the requests in the log since a time (seconds since 1970)."""
    samples = read_log(engine_snapshot.log_lines(context, generation, since, most_lines))
    return histograms(samples.requests if samples else ())


def histograms(requests: Iterable[LoggedRequest]) -> tuple[Histogram, Histogram]:
    """Return histograms of the seconds to the first token and between tokens, of ended requests.

    Requests without a token are left out: the client gave up before the first one.
    """
    done = [one for one in requests if one.finished and one.generated_tokens]
    speeds = (one.generation_tok_s for one in done)
    return (
        _histogram([one.prompt_s for one in done if one.prompt_s is not None], TTFT_BOUNDS),
        _histogram([1 / speed for speed in speeds if speed], TOKEN_BOUNDS),
    )


def _histogram(values: Sequence[float], bounds: Sequence[float]) -> Histogram:
    return Histogram(
        buckets=tuple((b, float(sum(value <= b for value in values))) for b in bounds),
        count=float(len(values)),
        sum=sum(values),
    )


def _moment(when: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(when).timestamp()
    except (ValueError, TypeError):
        return None


#: A sample: the suffix of its name, its labels beside the stack, and its value (None: no sample).
_Sample = tuple[str, dict[str, str], float | None]


def _value(value: float | None) -> Iterable[_Sample]:
    return [("", {}, value)]


def _states(one: StackMetrics) -> Iterable[_Sample]:
    return [("", {"state": state}, one.state == state) for state in _STATES]


def _info(one: StackMetrics) -> Iterable[_Sample]:
    told = ((name, getattr(one, name)) for name in ("profile", "objective", "engine", "model"))
    return [("", {name: value for name, value in told if value is not None}, 1)]


def _estimated_usage(one: StackMetrics) -> Iterable[_Sample]:
    numbers = one.numbers
    return _value(numbers.kv_usage) if numbers and "kv_usage" in numbers.estimates else ()


def _buckets(one: Histogram | None) -> Iterable[_Sample]:
    if one is None:
        return ()
    counts = [(f"{bound:g}", count) for bound, count in one.buckets]
    counts.append(("+Inf", one.count))
    buckets = [("_bucket", {"le": bound}, count) for bound, count in counts]
    return [*buckets, ("_sum", {}, one.sum), ("_count", {}, one.count)]


#: The metrics of a stack: name, kind, help, and the function that returns the samples of a stack.
_METRICS: tuple[tuple[str, str, str, Callable[[StackMetrics], Iterable[_Sample]]], ...] = (
    ("up", "gauge", "Whether the stack's engine is active and answers its health check.",
     lambda one: _value(one.state == "ready")),
    ("stack_state", "gauge", "The state of the stack: 1 for the one it is in.", _states),
    ("stack_info", "gauge", "What the stack is.", _info),
    ("generation", "gauge", "The number of the generation that is installed.",
     lambda one: _value(one.generation)),
    ("restarts_total", "counter",
     "How often systemd has started the engine again since it was last started by hand.",
     lambda one: _value(one.restarts)),
    ("running_seconds", "gauge", "How long the engine's unit has been active.",
     lambda one: _value(one.since_s)),
    ("check_ok", "gauge", "Whether the last check of the stack found nothing wrong.",
     lambda one: _value(one.checked == "ok" if one.checked else None)),
    ("check_timestamp_seconds", "gauge", "When the last check of the stack was.",
     lambda one: _value(one.checked_at)),
    ("changed_by_hand", "gauge", "How many things are not as they were deployed.",
     lambda one: _value(one.drift)),
    ("kv_cache_usage_ratio", "gauge",
     "Estimate: tokens in slots that work, of all that the KV cache holds. For engines that do not "
     "report it.", _estimated_usage),
    ("time_to_first_token_seconds", "histogram",
     "Estimate: seconds that prompts took, without waiting, from the log of this hour. For engines "
     "without a histogram.", lambda one: _buckets(one.ttft)),
    ("time_per_output_token_seconds", "histogram",
     "Estimate: the mean seconds from token to token of each request, from the log of this hour. "
     "For engines without a histogram.", lambda one: _buckets(one.token_time)),
)  # fmt: skip


def metrics_text(report: MetricsReport) -> str:
    """Return the metrics in Prometheus' text format (0.0.4); leave out those without samples."""
    guard = "Whether all stacks are checked every minute."
    lines = _lines("guard", "gauge", guard, _value(report.guard))
    for name, kind, text, samples_of in _METRICS:
        samples = [
            (suffix, {"stack": one.stack, **labels}, value)
            for one in report.stacks
            for suffix, labels, value in samples_of(one)
        ]
        lines += _lines(name, kind, text, samples)
    return "".join(f"{line}\n" for line in lines)


def _lines(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> list[str]:
    """Return the lines of one metric; none without a sample that has a value."""
    lines = []
    for suffix, labels, value in samples:
        if value is not None:
            inside = ",".join(f'{key}="{_escaped(one)}"' for key, one in labels.items())
            braces = f"{{{inside}}}" if inside else ""
            lines.append(f"stackctl_{name}{suffix}{braces} {_number(value)}")
    head = [f"# HELP stackctl_{name} {text}", f"# TYPE stackctl_{name} {kind}"]
    return [*head, *lines] if lines else []


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
