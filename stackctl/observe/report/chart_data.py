"""The charts of a page, made from measurements. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stackctl.observe.report import charts
from stackctl.values.bench import BenchCell, BenchReport, RequestSample


def run_charts(run: BenchReport, samples: Sequence[RequestSample]) -> list[str]:
    """Return the charts of one run; an empty text for each chart without data."""
    cells = run.cells
    fresh = [cell for cell in cells if not cell.shape.cached]
    found = [
        charts.line_chart(
            "Whole answer, by its length",
            [
                _series(f"{_tokens(prompt)} in, p50", group, "e2e_s")
                for prompt, group in _grouped(fresh, "prompt_tokens", concurrency=1).items()
            ],
            x_label="tokens of the answer",
            y_label="seconds",
        ),
        charts.line_chart(
            "First token, by length of the prompt",
            [
                charts.Series(
                    "p50 (band: p5 to p95)",
                    *_points([cell for cell in fresh if cell.shape.concurrency == 1]),
                )
            ],
            x_label="tokens of the prompt",
            y_label="seconds",
        ),
        *_throughput(fresh),
    ]
    answered = [sample for sample in samples if sample.error is None]
    firsts = [sample.ttft_s for sample in answered if sample.ttft_s is not None]
    gaps = [gap for sample in answered for gap in sample.gaps_ms]
    found.append(charts.histogram_chart("First token, all requests", firsts, x_label="seconds"))
    found.append(
        charts.histogram_chart("Between tokens, all requests", gaps, x_label="milliseconds")
    )
    return found


def _throughput(cells: Sequence[BenchCell]) -> list[str]:
    """Return two charts of tokens per second over concurrency.

    They have one line for each pair of lengths that was measured at more than one concurrency.
    """
    groups: dict[tuple[int, int], list[BenchCell]] = {}
    for cell in cells:
        if cell.output_tok_s is not None:
            key = (cell.shape.prompt_tokens, cell.shape.output_tokens)
            groups.setdefault(key, []).append(cell)
    swept = {key: group for key, group in groups.items() if len(group) > 1}
    everyone, each = [], []
    for (prompt, output), group in swept.items():
        ordered = sorted(group, key=lambda cell: cell.shape.concurrency)
        name = f"{_tokens(prompt)} in, {output} out"
        points = tuple((float(c.shape.concurrency), c.output_tok_s or 0.0) for c in ordered)
        everyone.append(charts.Series(name, points))
        speeds = [(c.shape.concurrency, c.generation_tok_s) for c in ordered]
        known = tuple((float(n), speed.p50) for n, speed in speeds if speed is not None)
        each.append(charts.Series(name, known))
    label = "requests at the same time"
    return [
        charts.line_chart("Throughput of all requests", everyone, x_label=label, y_label="tok/s"),
        charts.line_chart("Speed of each request (p50)", each, x_label=label, y_label="tok/s"),
    ]


def _grouped(
    cells: Sequence[BenchCell], key: str, *, concurrency: int
) -> Mapping[int, list[BenchCell]]:
    groups: dict[int, list[BenchCell]] = {}
    for cell in cells:
        if cell.shape.concurrency == concurrency:
            groups.setdefault(getattr(cell.shape, key), []).append(cell)
    return dict(sorted(groups.items()))


def _series(name: str, cells: Sequence[BenchCell], figure: str) -> charts.Series:
    known = sorted(
        (cell.output_tokens or cell.shape.output_tokens, value)
        for cell in cells
        if (value := getattr(cell, figure)) is not None
    )
    return charts.Series(
        name,
        tuple((tokens, value.p50) for tokens, value in known),
        tuple((value.p5, value.p95) for _, value in known),
    )


def _points(
    cells: Sequence[BenchCell],
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """Return points and bands of TTFT by prompt length.

    Of each prompt length only the cell with the shortest answers counts, because TTFT does not
    depend on the answer.
    """
    shortest: dict[int, BenchCell] = {}
    for cell in cells:
        known = shortest.get(cell.shape.prompt_tokens)
        if cell.ttft_s is not None and (
            known is None or cell.shape.output_tokens < known.shape.output_tokens
        ):
            shortest[cell.shape.prompt_tokens] = cell
    rows = sorted(
        (cell.prompt_tokens or cell.shape.prompt_tokens, cell.ttft_s)
        for cell in shortest.values()
        if cell.ttft_s is not None
    )
    return tuple((x, q.p50) for x, q in rows), tuple((q.p5, q.p95) for _, q in rows)


def _tokens(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 else str(count)


def comparison_charts(runs: Sequence[BenchReport]) -> list[str]:
    """Return charts of throughput over concurrency and of TTFT over prompt length, by run."""
    series, singles = [], []
    for run in runs[-charts.MOST_SERIES :]:
        name = f"generation {run.generation}, {run.objective} (bench {run.id})"
        best: dict[int, float] = {}
        for cell in run.cells:
            if cell.output_tok_s is not None and not cell.shape.cached:
                concurrency = cell.shape.concurrency
                best[concurrency] = max(best.get(concurrency, 0.0), cell.output_tok_s)
        points = tuple((float(key), value) for key, value in sorted(best.items()))
        series.append(charts.Series(name, points))
        alone = [c for c in run.cells if c.shape.is_single_uncached]
        singles.append(charts.Series(name, _points(alone)[0]))
    return [
        charts.line_chart("Throughput, run by run", series,
                     x_label="requests at the same time", y_label="tok/s"),
        charts.line_chart("First token (p50), run by run", singles,
                     x_label="tokens of the prompt", y_label="seconds"),
    ]  # fmt: skip
