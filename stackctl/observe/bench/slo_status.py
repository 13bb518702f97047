"""The SLO status of a running stack, by its last measurement and by its engine's metrics."""

from __future__ import annotations

from stackctl.deploy.context import Context
from stackctl.observe import engine_snapshot
from stackctl.observe.bench.capacity import serving_capacity
from stackctl.observe.bench.slo import compare_latency, compare_with_slo, slo_results
from stackctl.quantity import format_share
from stackctl.state.bench_db import BenchDatabase
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics
from stackctl.values.profile import Slo
from stackctl.values.result import Result

#: Seconds that the engine has to report its metrics.
_ANSWER_S = 5
#: A 95th percentile needs at least so many observations.
_FEWEST = 20


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
        most = serving_capacity(generation)
        rows = slo_results(
            cells, slo, slots=most.slots, source=source, client=latest.client, context=most.context
        )
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
        found.append(compare_latency(name, allowed, value * scale, unit, source=source))
    hits, lookups = metrics.prefix_hits, metrics.prefix_queries
    if slo.min_prefix_hits is not None and hits is not None and lookups:
        source = f"{lookups:,.0f} prompt tokens since the engine started, those of benches too"
        found.append(
            compare_with_slo(
                "slo-prefix-engine", slo.min_prefix_hits, hits / lookups, format_share,
                source=source, most=False,
            )
        )  # fmt: skip
    return found
