"""Judgement of measurements and of an engine's metrics by a profile's SLO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from stackctl.deploy.context import Context
from stackctl.diagnose.results import sort_by_severity
from stackctl.observe import engine_snapshot
from stackctl.observe.bench.matrix import Capacity, serving_capacity
from stackctl.quantity import format_number, format_share
from stackctl.state.bench_db import BenchDatabase
from stackctl.values.bench import BenchCell, BenchClient, Workload
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics
from stackctl.values.profile import Slo
from stackctl.values.result import Result

#: Prompts up to _LONGER times the SLO's length count for its TTFT. If all of them are shorter than
#: _SHORTER times that length, they do not prove that the SLO is met.
_SHORTER, _LONGER = 0.9, 1.02
#: Seconds that the engine has to report its metrics.
_ANSWER_S = 5
#: A 95th percentile needs at least so many observations.
_FEWEST = 20
#: Remedies for missed objectives.
_REMEDIES = {
    "slo-ttft": "shorter prompts, a smaller model, or less at once; stackctl diagnose tells why",
    "slo-itl": "less at once, or a smaller or more quantised model",
    "slo-speed": "less at once, or a smaller or more quantised model",
    "slo-prefix": "keep system prompt and tool list the same in every request",
}
#: The remedy if the client is the limit.
_UNHURRIED = "fewer at once, or --with aiperf from a machine with free processors"


def slo_results(
    cells: Sequence[BenchCell], slo: Slo | None, limits: Capacity, *, source: str,
    client: BenchClient | None = None,
) -> tuple[Result, ...]:  # fmt: skip
    """Return the results of a measurement, most important first.

    Cells with more requests at once than the stack's capacity are not compared with the SLO.
    ``source`` is the origin of the figures for display.
    """
    found = [_failures(cells)]
    if client is not None and client.limited:
        found.append(_limited(client))
    served = [cell for cell in cells if cell.shape.concurrency <= limits.slots]
    if slo is not None and slo.ttft_s is not None:
        found.append(_ttft(served, slo, slo.ttft_s, limits.context, source))
    if slo is not None and slo.itl_ms is not None:
        found.append(_itl(served, slo.itl_ms, client, source))
    if slo is not None and slo.min_tok_s is not None:
        rows = ((c.generation_tok_s.p5, c) for c in served if c.generation_tok_s)
        seen, at = _worst(rows, min)
        found.append(
            compare_with_slo("slo-speed", slo.min_tok_s, seen, "tok/s", source=source, most=False,
                             mark="p5 ", at=at)
        )  # fmt: skip
    if slo is not None and slo.min_prefix_hits is not None:
        shares = (
            (c.cached_tokens / c.prompt_tokens, c)
            for c in served
            if c.shape.cached and c.prompt_tokens and c.cached_tokens is not None
        )
        seen, at = _worst(shares, min)
        found.append(
            compare_with_slo("slo-prefix", slo.min_prefix_hits, seen, "%", source=source,
                             most=False, mark="", at=at)
        )  # fmt: skip
    return sort_by_severity(found)


def compare_with_slo(
    name: str, allowed: float, seen: float | None, unit: str, *, source: str, most: bool = True,
    mark: str = "p95 ", at: str = "",
) -> Result:  # fmt: skip
    """Compare a measured value (None: not measured) with the limit of an objective.

    The limit is an upper bound, or a lower bound if ``most`` is False. ``unit`` is "%" for shares.
    ``source`` is the origin of the value. ``mark``, the quantile, is put before the values, and
    ``at``, the cell, after the measured one.
    """

    def told(value: float) -> str:
        return format_share(value) if unit == "%" else f"{format_number(value)} {unit}"

    expected = f"{mark}at {'most' if most else 'least'} {told(allowed)}"
    if seen is None:
        return Result(name=name, status="skip", expected=expected, actual="not measured",
            evidence=source, remedy="stackctl bench")  # fmt: skip
    well = seen <= allowed if most else seen >= allowed
    actual = told(seen)
    if not well and actual == told(allowed):
        # Rounding made the missed objective look like a kept one.
        actual = f"{'just over' if most else 'just under'} {actual}"
    return Result(
        name=name,
        status="ok" if well else "fail",
        expected=expected,
        actual=mark + actual + at,
        evidence=source,
        remedy=None if well else _REMEDIES.get(name.removesuffix("-engine")),
    )


def workload_text(workload: Workload) -> str:
    """Return a cell's workload as text."""
    text = (
        f"{workload.prompt_tokens:,} in, {workload.output_tokens:,} out, {workload.concurrency} "
        f"at once"
    )
    return text + (", prefix cached" if workload.cached else "")


def _ttft(
    cells: Sequence[BenchCell], slo: Slo, allowed_s: float, context: int, source: str
) -> Result:
    most = slo.prompt_tokens * _LONGER
    fair = [c for c in cells if c.ttft_s and not c.shape.cached and c.shape.prompt_tokens <= most]
    seen, at = _worst(((c.ttft_s.p95, c) for c in fair if c.ttft_s), max)
    result = compare_with_slo("slo-ttft", allowed_s, seen, "s", source=source, at=at)
    longest = max((cell.shape.prompt_tokens for cell in fair), default=0)
    if result.status != "ok" or longest >= slo.prompt_tokens * _SHORTER:
        return result
    if context > slo.prompt_tokens:
        told = f"not measured at the {slo.prompt_tokens:,} tokens that it promises"
        remedy = f"stackctl bench --prompt {slo.prompt_tokens}"
    else:
        told = f"a context of {context:,} holds no prompt of the {slo.prompt_tokens:,} "
        told += "that it promises"
        remedy = "a larger context, or a smaller slo.prompt_tokens"
    return msgspec.structs.replace(result, status="warn", evidence=told, remedy=remedy)


def _itl(
    cells: Sequence[BenchCell], allowed_ms: float, client: BenchClient | None, source: str
) -> Result:
    """Compare the gaps between tokens; warn if the client read so late that it proves nothing.

    Tokens that are read together seem to have arrived together.
    """
    seen, at = _worst(((c.itl_ms.p95, c) for c in cells if c.itl_ms), max)
    result = compare_with_slo("slo-itl", allowed_ms, seen, "ms", source=source, at=at)
    late = client.lag_ms_p99 if client is not None and client.limited else None
    if result.status != "ok" or not late or late < allowed_ms:
        return result
    told = f"the client read {late:.1f} ms late (p99), more than the limit"
    return msgspec.structs.replace(result, status="warn", evidence=told, remedy=_UNHURRIED)


def _worst(
    rows: Iterable[tuple[float, BenchCell]], pick: Callable[..., tuple[float, BenchCell]]
) -> tuple[float | None, str]:
    found = list(rows)
    if not found:
        return None, ""
    value, cell = pick(found, key=lambda row: row[0])
    return value, f" ({workload_text(cell.shape)})"


def _failures(cells: Sequence[BenchCell]) -> Result:
    failed, asked = sum(cell.failed for cell in cells), sum(cell.requests for cell in cells)
    notes = [note for cell in cells if cell.failed for note in cell.notes]
    return Result(
        name="requests",
        status="fail" if failed else "ok",
        expected="all answered",
        actual=f"{failed} of {asked} failed" if failed else f"{asked} answered",
        evidence=notes[0] if notes else None,
        remedy="stackctl logs" if failed else None,
    )


def _limited(client: BenchClient) -> Result:
    lag = "" if client.lag_ms_p99 is None else f", reads {client.lag_ms_p99:.1f} ms late (p99)"
    return Result(
        name="client",
        status="warn",
        expected="a client that waits for the engine",
        actual=f"used {format_share(client.cpu_share)} of a processor{lag}",
        evidence="the figures may be the client's limit, not the engine's",
        remedy=_UNHURRIED,
    )


def slo_status(context: Context, generation: Generation, slo: Slo | None) -> tuple[Result, ...]:
    """Return results for each objective of an SLO.

    ``slo-NAME`` uses the latest measurement of this generation, ``slo-NAME-engine`` the engine's
    histograms and counters since its start, if it has them.

    Raises:
        StackctlError: the stored measurements cannot be read.
    """
    if slo is None or not slo.has_objectives:
        return (Result(name="slo", status="info", actual="the profile has none"),)
    latest = BenchDatabase(context.paths.state).latest(generation.stack, generation.number)
    found: list[Result] = []
    if latest is None:
        found.append(
            Result(
                name="slo",
                status="warn",
                expected="a measurement",
                actual=f"generation {generation.number} was not measured yet",
                remedy=f"stackctl bench {generation.stack} --quick",
            )
        )
    else:
        source = f"bench {latest.id} of {latest.when}"
        cells = [cell for cell in latest.cells if cell.requests > cell.failed]
        limits = serving_capacity(generation.plan, generation.outcome.report)
        rows = slo_results(cells, slo, limits, source=source, client=latest.client)
        found += [row for row in rows if row.name.startswith("slo-")]
    metrics, _ = engine_snapshot.scrape_metrics(generation, timeout_s=_ANSWER_S)
    if metrics is not None:
        found += slo_from_metrics(metrics, slo)
    return tuple(found)


def slo_from_metrics(metrics: EngineMetrics, slo: Slo) -> list[Result]:
    """Return results for the objectives that an engine's own metrics cover.

    The metrics include all requests since its start, also those with prompts of other lengths than
    the SLO's.
    """
    found = []
    for name, histogram, allowed, scale, unit in (
        ("slo-ttft-engine", metrics.ttft, slo.ttft_s, 1.0, "s"),
        ("slo-itl-engine", metrics.itl, slo.itl_ms, 1000.0, "ms"),
    ):
        if histogram is None or allowed is None or histogram.count < _FEWEST:
            continue
        if (value := histogram.quantile(0.95)) is None:
            continue
        source = f"the engine's histogram, {histogram.count:,.0f} values since it started"
        found.append(compare_with_slo(name, allowed, value * scale, unit, source=source))
    hits, lookups = metrics.prefix_hits, metrics.prefix_queries
    if slo.min_prefix_hits is not None and hits is not None and lookups:
        source = f"{lookups:,.0f} prompt tokens since the engine started, those of benches too"
        found.append(
            compare_with_slo("slo-prefix-engine", slo.min_prefix_hits, hits / lookups, "%",
                             source=source, most=False, mark="")
        )  # fmt: skip
    return found
