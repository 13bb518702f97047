"""Prometheus metrics that engines do not export: the state of stacks, and estimates.

The estimates are the KV cache usage and the latencies of engines that report neither.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_generation
from stackctl.diagnose.log_samples import read_log
from stackctl.errors import StackctlError
from stackctl.observe import engine_snapshot
from stackctl.observe.status import status_report
from stackctl.values.generation import Generation
from stackctl.values.metrics import Histogram, LoggedRequest, MetricsReport, StackMetrics
from stackctl.values.status import StackState, StackStatus

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
            since_s = engine_snapshot.read_unit_state(context, generation).running_s
            if numbers is not None and numbers.ttft is None and since_s is not None:
                ttft, token_time = _latencies(context, generation, since_s)
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


def _latencies(
    context: Context, generation: Generation, since_s: float
) -> tuple[Histogram, Histogram]:
    """Return the histograms of this hour's requests, from the log.

    The hour limits the part of the log that is read. Prometheus takes the beginning of an hour for
    a counter reset, which its functions expect.
    """
    now = time.time()
    first = max(now - since_s, now - now % _HOUR_S)
    lines = engine_snapshot.log_lines(context, generation, first, _MOST_LINES)
    samples = read_log(lines)
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


@dataclass
class _Family:
    """One metric with its samples as (suffix, labels, value)."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, dict[str, str], float]]


def metrics_text(report: MetricsReport) -> str:
    """Return the metrics in Prometheus' text format (0.0.4); empty families are left out."""
    lines = []
    for family in _families(report):
        if not family.samples:
            continue
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for suffix, labels, value in family.samples:
            inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
            braces = f"{{{inside}}}" if inside else ""
            lines.append(f"{family.name}{suffix}{braces} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _families(report: MetricsReport) -> Iterable[_Family]:
    guard = None if report.guard is None else float(report.guard)
    yield _gauge("guard", "Whether all stacks are checked every minute.", ({}, guard))
    yield from _states(report.stacks)
    yield from _checks(report.stacks)
    yield from _estimates(report.stacks)


def _gauge(name: str, help_text: str, *samples: tuple[dict[str, str], float | None]) -> _Family:
    known = [("", labels, value) for labels, value in samples if value is not None]
    return _Family(f"stackctl_{name}", "gauge", help_text, known)


def _of(stack: StackMetrics, **more: str) -> dict[str, str]:
    """Return the labels of a stack's sample."""
    return {"stack": stack.stack, **more}


def _states(stacks: Sequence[StackMetrics]) -> Iterable[_Family]:
    """Return the families about the state of stacks."""
    yield _gauge(
        "up",
        "Whether the stack's engine is active and answers its health check.",
        *((_of(one), float(one.state == "ready")) for one in stacks),
    )
    yield _gauge(
        "stack_state",
        "The state of the stack: 1 for the one it is in.",
        *((_of(one, state=name), float(one.state == name)) for one in stacks for name in _STATES),
    )
    yield _gauge("stack_info", "What the stack is.", *((_info(one), 1.0) for one in stacks))
    yield _gauge(
        "generation",
        "The number of the generation that is installed.",
        *((_of(one), _float(one.generation)) for one in stacks),
    )
    yield _Family(
        "stackctl_restarts_total",
        "counter",
        "How often systemd has started the engine again since it was last started by hand.",
        [("", _of(one), float(one.restarts)) for one in stacks if one.restarts is not None],
    )
    yield _gauge(
        "running_seconds",
        "How long the engine's unit has been active.",
        *((_of(one), one.since_s) for one in stacks),
    )


def _checks(stacks: Sequence[StackMetrics]) -> Iterable[_Family]:
    """Return the families about checks and about differences from the deployed state."""
    yield _gauge(
        "check_ok",
        "Whether the last check of the stack found nothing wrong.",
        *((_of(one), float(one.checked == "ok") if one.checked else None) for one in stacks),
    )
    yield _gauge(
        "check_timestamp_seconds",
        "When the last check of the stack was.",
        *((_of(one), one.checked_at) for one in stacks),
    )
    yield _gauge(
        "changed_by_hand",
        "How many things are not as they were deployed.",
        *((_of(one), float(one.drift)) for one in stacks),
    )


def _estimates(stacks: Sequence[StackMetrics]) -> Iterable[_Family]:
    """Return the families of estimates, for engines that do not report these metrics."""
    estimated = [one for one in stacks if one.numbers and "kv_usage" in one.numbers.estimates]
    yield _gauge(
        "kv_cache_usage_ratio",
        "Estimate: tokens in slots that work, of all that the KV cache holds. For engines "
        "that do not report it.",
        *((_of(one), one.numbers.kv_usage if one.numbers else None) for one in estimated),
    )
    yield _histograms(
        "time_to_first_token_seconds",
        "Estimate: seconds that prompts took, without waiting, from the log of this hour. For "
        "engines without a histogram.",
        [(_of(one), one.ttft) for one in stacks],
    )
    yield _histograms(
        "time_per_output_token_seconds",
        "Estimate: the mean seconds from token to token of each request, from the log of this "
        "hour. For engines without a histogram.",
        [(_of(one), one.token_time) for one in stacks],
    )


def _histograms(
    name: str, help_text: str, seen: Sequence[tuple[dict[str, str], Histogram | None]]
) -> _Family:
    samples: list[tuple[str, dict[str, str], float]] = []
    for labels, one in seen:
        if one is None:
            continue
        samples += [("_bucket", {**labels, "le": f"{b:g}"}, n) for b, n in one.buckets]
        samples.append(("_bucket", {**labels, "le": "+Inf"}, one.count))
        samples += [("_sum", labels, one.sum), ("_count", labels, one.count)]
    return _Family(f"stackctl_{name}", "histogram", help_text, samples)


def _info(one: StackMetrics) -> dict[str, str]:
    told = {
        "stack": one.stack,
        "profile": one.profile,
        "objective": one.objective,
        "engine": one.engine,
        "model": one.model,
    }
    return {name: value for name, value in told.items() if value is not None}


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
