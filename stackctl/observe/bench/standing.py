"""How a running stack stands to its SLO: by its last measurement, and by its engine's counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.engines.engine import Engine
from stackctl.health import endpoint
from stackctl.machine import http
from stackctl.observe.bench.judge import judge, judged, latency, percent
from stackctl.observe.bench.limits import limits
from stackctl.state.benches import Benches
from stackctl.values.generation import Generation
from stackctl.values.profile import Slo
from stackctl.values.result import Result

_LINE = re.compile(
    r"^(?P<name>[\w:]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>[0-9.eE+-]+|\+?Inf|NaN)$", re.MULTILINE
)
_BOUND = re.compile(r'(?:^|,)le="([^"]+)"')
#: So few observations are no 95th percentile.
_FEWEST = 20


def standing(context: Context, generation: Generation, slo: Slo | None) -> tuple[Result, ...]:
    """Results for each objective of an SLO: ``slo-NAME`` by the latest measurement of this
    generation, ``slo-NAME-engine`` by the engine's histograms and counters since it started, where
    it has them. Raises StackctlError when the measurements cannot be read."""
    if slo is None or not slo.asks:
        return (Result(name="slo", status="info", actual="the profile has none"),)
    latest = Benches(context.paths.state).latest(generation.stack, generation.number)
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
        rows = judge(cells, slo, slots=limits(generation).slots, source=source)
        found += [row for row in rows if row.name.startswith("slo-")]
    plan = generation.plan
    answer = http.get(endpoint.base_url(plan.listens) + "/metrics")
    if isinstance(answer, http.Answer) and answer.status == 200:
        found += by_engine(answer.text, find_engine(plan.engine), slo)
    return tuple(found)


def by_engine(text: str, engine: Engine, slo: Slo) -> list[Result]:
    """The objectives that an engine's own metrics can judge, over all requests since it started:
    also over prompts of other lengths than the SLO's."""
    found = []
    for name, metric, allowed, scale, unit in (
        ("slo-ttft-engine", engine.histograms.get("ttft"), slo.ttft_s, 1.0, "s"),
        ("slo-itl-engine", engine.histograms.get("itl"), slo.itl_ms, 1000.0, "ms"),
    ):
        if metric is None or allowed is None:
            continue
        count, value = histogram_quantile(text, metric, 0.95)
        source = f"{metric}, {count:,.0f} observations since the engine started"
        if value is None or count < _FEWEST:
            continue
        found.append(latency(name, allowed, value * scale, unit, source=source))
    hits, lookups = (_total(text, names) for names in engine.prefix_counters)
    if slo.min_prefix_hits is not None and hits is not None and lookups:
        source = f"{lookups:,.0f} prompt tokens since the engine started, those of benches too"
        found.append(
            judged(
                "slo-prefix-engine", slo.min_prefix_hits, hits / lookups, percent, source=source,
                most=False,
            )
        )  # fmt: skip
    return found


def histogram_quantile(text: str, metric: str, share: float) -> tuple[float, float | None]:
    """Observations and a quantile of a Prometheus histogram, its label sets taken together.

    Linear within a bucket, as PromQL's histogram_quantile; above the last bound it is that bound.
    """
    buckets: dict[float, float] = {}
    for match in _LINE.finditer(text):
        if match["name"] == f"{metric}_bucket" and (bound := _BOUND.search(match["labels"] or "")):
            limit = math.inf if "Inf" in bound[1] else float(bound[1])
            buckets[limit] = buckets.get(limit, 0.0) + float(match["value"])
    count = buckets.get(math.inf, 0.0)
    if count <= 0:
        return 0.0, None
    rank, low, below = share * count, 0.0, 0.0
    for limit, upto in sorted(buckets.items()):
        if upto >= rank:
            if math.isinf(limit):
                return count, low
            inside = upto - below
            return count, low + (limit - low) * ((rank - below) / inside if inside else 1.0)
        low, below = limit, upto
    return count, low


def _total(text: str, names: Sequence[str]) -> float | None:
    values = [float(m["value"]) for m in _LINE.finditer(text) if m["name"] in names]
    return sum(values) if values else None
