"""The comparison of two runs, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stackctl.engines import engine as find_engine
from stackctl.observe.bench.statistics import quantile, ratio
from stackctl.state.bench_db import BenchDatabase
from stackctl.values.bench import (
    BenchComparison,
    BenchReport,
    CellDifference,
    ComparisonVerdict,
    RequestSample,
    Workload,
)

#: A smaller relative change is no difference: machines drift by as much between two runs.
NEGLIGIBLE = 0.02

Figure = Literal["ttft_s", "generation_tok_s", "e2e_s"]
#: The compared figures of a request, and True for those of which more is better.
_FIGURES: dict[Figure, bool] = {"ttft_s": False, "generation_tok_s": True, "e2e_s": False}


def compare_runs(benches: BenchDatabase, first: int, second: int) -> BenchComparison:
    """Compare the second run with the first.

    Cells that only one of the runs has are listed without figures.

    Raises:
        StackctlError: exit 4 if a run is not stored.
    """
    before, after = benches.read(first), benches.read(second)
    samples = _by_shape(before, benches.samples(first)), _by_shape(after, benches.samples(second))
    both = [workload for workload in samples[0] if workload in samples[1]]
    return BenchComparison(
        before=first,
        after=second,
        differs=tuple(_differs(benches, before, after)),
        only_before=tuple(workload for workload in samples[0] if workload not in samples[1]),
        only_after=tuple(workload for workload in samples[1] if workload not in samples[0]),
        differences=tuple(
            difference
            for workload in both
            for difference in cell_differences(workload, samples[0][workload], samples[1][workload])
        ),
    )


def cell_differences(
    workload: Workload, before: Sequence[RequestSample], after: Sequence[RequestSample]
) -> tuple[CellDifference, ...]:
    """Compare the figures of one cell that both runs have."""
    found = []
    for figure, more_is_better in _FIGURES.items():
        values = [
            [getattr(sample, figure) for sample in side if not sample.error]
            for side in (before, after)
        ]
        old, new = ([value for value in side if value is not None] for side in values)
        if not old or not new:
            continue
        factor = ratio(old, new)
        found.append(
            CellDifference(
                shape=workload,
                figure=figure,
                before=quantile(old, 0.5),
                after=quantile(new, 0.5),
                n=(len(old), len(new)),
                ratio=factor,
                word=verdict_on_factor(factor, more_is_better=more_is_better),
            )
        )
    return tuple(found)


def verdict_on_factor(
    factor: tuple[float, float, float] | None, *, more_is_better: bool
) -> ComparisonVerdict:
    """Return the verdict on a factor (estimate, low, high); None: too few values.

    A difference counts if the interval excludes 1 and the estimate is not negligible.
    """
    if factor is None:
        return "too few"
    middle, low, high = factor
    if low <= 1 <= high or abs(middle - 1) < NEGLIGIBLE:
        return "no difference"
    return "better" if (middle > 1) == more_is_better else "worse"


def _by_shape(
    report: BenchReport, samples: Sequence[RequestSample]
) -> dict[Workload, list[RequestSample]]:
    found: dict[Workload, list[RequestSample]] = {cell.shape: [] for cell in report.cells}
    for sample in samples:
        if sample.cell < len(report.cells):
            found[report.cells[sample.cell].shape].append(sample)
    return found


def _differs(benches: BenchDatabase, before: BenchReport, after: BenchReport) -> list[str]:
    """Return the other differences between two runs, as possible causes of their figures."""
    assert before.id is not None
    assert after.id is not None
    pairs = [
        (name.replace("_", " "), str(getattr(before, name)), str(getattr(after, name)))
        for name in ("stack", "box", "tool", "model", "engine", "objective")
    ]
    plans = benches.plan(before.id), benches.plan(after.id)
    hosts = benches.host(before.id), benches.host(after.id)
    models = [" · ".join(filter(None, (host.cpu.model, *(g.name for g in host.gpus))))
              for host in hosts]  # fmt: skip
    pairs.append(("machine", models[0], models[1]))
    found = [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
    if before.image_id != after.image_id:
        found.append("another image of the engine")
    decided = [{d.field: d.value for d in plan.decisions} for plan in plans]
    ports = {find_engine(plan.engine).port_option for plan in plans}
    fields = [f for f in dict.fromkeys((*decided[0], *decided[1])) if f not in ports]
    found += [
        f"{field}: {_shown(decided[0].get(field))} -> {_shown(decided[1].get(field))}"
        for field in fields
        if decided[0].get(field) != decided[1].get(field)
    ]
    return found


def _shown(value: object) -> str:
    return "(unset)" if value is None else str(value)
