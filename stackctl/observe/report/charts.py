"""The charts of a page, from measurements to SVG text. Pure.

Colours are CSS classes of the page, so that they follow its light or dark scheme. Series differ by
marker and dash too, not only by colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from stackctl.observe.bench.statistics import quantile
from stackctl.quantity import format_number, truncate
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, RequestSample

#: Sizes in units of the viewBox; the page scales the chart to its width.
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 46
_LEGEND_ROW = 20
#: The most series in a chart; the page has as many colours.
_MOST_SERIES = 6
_CIRCLE = "m-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z"
#: Class and outline of the markers: circle, square, triangle, diamond, ring and cross.
_MARKS = (
    ("dot", _CIRCLE),
    ("dot", "m-4.5,-4.5h9v9h-9z"),
    ("dot", "m0,-5.5l5.5,10h-11z"),
    ("dot", "m0,-6l6,6l-6,6l-6,-6z"),
    ("line", _CIRCLE),
    ("line", "m-4.5,-4.5l9,9m0,-9l-9,9"),
)
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4")


@dataclass(frozen=True)
class Series:
    """The points (x, y) of one line in the order of x; ``band`` has (low, high) for each y."""

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class _Scale:
    """A linear map from values to places on an axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def run_charts(run: BenchReport, samples: Sequence[RequestSample]) -> list[str]:
    """Return the charts of one run that have data."""
    fresh = [cell for cell in run.cells if not cell.shape.cached]
    groups: dict[int, list[BenchCell]] = {}
    for cell in fresh:
        if cell.shape.concurrency == 1:
            groups.setdefault(cell.shape.prompt_tokens, []).append(cell)
    wholes = [
        _median_series(
            f"{_tokens(prompt)} in, p50",
            [(cell.output_tokens or cell.shape.output_tokens, cell.e2e_s) for cell in group],
        )
        for prompt, group in sorted(groups.items())
    ]
    singles = _median_series("p50 (band: p5 to p95)", _first_tokens(run))
    answered = [sample for sample in samples if sample.error is None]
    firsts = [sample.ttft_s for sample in answered if sample.ttft_s is not None]
    gaps = [gap for sample in answered for gap in sample.gaps_ms]
    found = (
        line_chart(
            "Whole answer, by its length", wholes,
            x_label="tokens of the answer", y_label="seconds",
        ),
        line_chart(
            "First token, by length of the prompt", [singles],
            x_label="tokens of the prompt", y_label="seconds",
        ),
        *_throughput(fresh),
        histogram_chart("First token, all requests", firsts, x_label="seconds"),
        histogram_chart("Between tokens, all requests", gaps, x_label="milliseconds"),
    )  # fmt: skip
    return [chart for chart in found if chart]


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
        everyone.append(Series(name, points))
        speeds = [(c.shape.concurrency, c.generation_tok_s) for c in ordered]
        known = tuple((float(n), speed.p50) for n, speed in speeds if speed is not None)
        each.append(Series(name, known))
    label = "requests at the same time"
    return [
        line_chart("Throughput of all requests", everyone, x_label=label, y_label="tok/s"),
        line_chart("Speed of each request (p50)", each, x_label=label, y_label="tok/s"),
    ]


def _median_series(name: str, values: Sequence[tuple[float, Quantiles | None]]) -> Series:
    """Return the medians as points and the middle 90 % as a band."""
    known = [(x, value) for x, value in sorted(values, key=lambda one: one[0]) if value is not None]
    return Series(
        name,
        tuple((x, value.p50) for x, value in known),
        tuple((value.p5, value.p95) for _, value in known),
    )


def _first_tokens(run: BenchReport) -> list[tuple[float, Quantiles | None]]:
    """Return TTFT by prompt length, of one request at a time.

    Of each prompt length only the cell with the shortest answers counts, because TTFT does not
    depend on the answer.
    """
    shortest: dict[int, BenchCell] = {}
    for cell in sorted(run.cells, key=lambda cell: cell.shape.output_tokens):
        if cell.shape.is_single_uncached and cell.ttft_s is not None:
            shortest.setdefault(cell.shape.prompt_tokens, cell)
    return [(cell.prompt_tokens or tokens, cell.ttft_s) for tokens, cell in shortest.items()]


def _tokens(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 else str(count)


def comparison_charts(runs: Sequence[BenchReport]) -> list[str]:
    """Return charts of throughput over concurrency and of TTFT over prompt length, by run."""
    series, singles = [], []
    for run in runs[-_MOST_SERIES:]:
        name = f"generation {run.generation}, {run.objective} (bench {run.id})"
        best: dict[int, float] = {}
        for cell in run.cells:
            if cell.output_tok_s is not None and not cell.shape.cached:
                concurrency = cell.shape.concurrency
                best[concurrency] = max(best.get(concurrency, 0.0), cell.output_tok_s)
        points = tuple((float(key), value) for key, value in sorted(best.items()))
        series.append(Series(name, points))
        singles.append(Series(name, _median_series(name, _first_tokens(run)).points))
    found = (
        line_chart("Throughput, run by run", series,
                   x_label="requests at the same time", y_label="tok/s"),
        line_chart("First token (p50), run by run", singles,
                   x_label="tokens of the prompt", y_label="seconds"),
    )  # fmt: skip
    return [chart for chart in found if chart]


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Return a line chart whose y axis begins at 0; empty if no series has a point."""
    drawn = [one for one in series if one.points][:_MOST_SERIES]
    if not drawn:
        return ""
    xs = sorted({x for one in drawn for x, _ in one.points})
    highest = max(y for one in drawn for _, y in (*one.points, *one.band))
    x_low, x_high = xs[0], xs[-1]
    if x_low == x_high:
        x_low, x_high = x_low * 0.5, x_high * 1.5 or 1.0
    y_ticks = axis_ticks(0.0, highest)
    height = _HEIGHT + _LEGEND_ROW * math.ceil(len(drawn) / 2)
    across = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    up = _Scale(0.0, y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    x_ticks = xs if len(xs) <= 8 else axis_ticks(x_low, x_high)
    parts = [_axes(across, up, x_ticks, y_ticks, x_label, y_label)]
    for number, one in enumerate(drawn):
        parts.append(_band(one, number, across, up))
        parts.append(_line(one, number, across, up))
        parts.append(_legend(one.name, number))
    return _svg(title, height, parts)


def histogram_chart(title: str, values: Sequence[float], *, x_label: str) -> str:
    """Return a histogram of values with marks at p50 and p95; empty for fewer than 8 values."""
    if len(values) < 8:
        return ""
    ordered = sorted(values)
    # A few outliers must not press all other values into one bar, so the highest 0.5 % may be cut.
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))] * 1.02 or 1.0
    low = min(ordered[0], high)
    marks = axis_ticks(low if low > high / 3 else 0.0, high)
    bins = min(40, max(8, round(2 * len(ordered) ** (1 / 3))))
    width = (marks[-1] - marks[0]) / bins
    counts = [0] * bins
    for value in ordered:
        if value <= marks[-1]:
            counts[min(bins - 1, int((value - marks[0]) / width))] += 1
    shares = [100 * count / len(ordered) for count in counts]
    y_ticks = axis_ticks(0.0, max(shares))
    across = _Scale(marks[0], marks[-1], _LEFT, _WIDTH - _RIGHT)
    up = _Scale(0.0, y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(across, up, marks, y_ticks, x_label, "% of them")]
    for number, share in enumerate(shares):
        if not share:
            continue
        ends = marks[0] + number * width, marks[0] + (number + 1) * width
        left, right = map(across, ends)
        label = "-".join(map(format_number, ends))
        parts.append(
            f'<rect class="s0 bar" x="{left + 0.5:.1f}" y="{up(share):.1f}" '
            f'width="{max(right - left - 1, 0.5):.1f}" height="{up(0) - up(share):.1f}">'
            f"<title>{escape(label)}: {share:.1f} %</title></rect>"
        )
    for line, (text, place) in enumerate((("p50", 0.5), ("p95", 0.95))):
        value = quantile(ordered, place)
        if value <= marks[-1]:
            parts.append(_mark_line(across(value), text, line))
    return _svg(title, _HEIGHT, parts)


def _mark_line(x: float, text: str, line: int) -> str:
    """Return a vertical mark with its text in row ``line``, because two marks may lie close."""
    right = x < _WIDTH - 60
    anchor = "start" if right else "end"
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{x + (4 if right else -4):.1f}" y="{_TOP + 11 + 13 * line}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def axis_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` + 2 round numbers, from ``low`` or below to ``high`` or above."""
    span = (high - low) or abs(high) or 1.0
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.9999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [number * step for number in range(first, last + 1)]


def _axes(
    across: _Scale,
    up: _Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
) -> str:
    base, parts = _HEIGHT - _BOTTOM, []
    for value in y_ticks:
        y = up(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{format_number(value)}</text>'
        )
    for value in x_ticks:
        x = across(value)
        if not _LEFT - 1 <= x <= _WIDTH - _RIGHT + 1:
            continue
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
            f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{format_number(value)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{base + 36}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" x="13" y="{(_TOP + base) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 13 {(_TOP + base) / 2})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _band(one: Series, number: int, across: _Scale, up: _Scale) -> str:
    if not one.band:
        return ""
    rows = list(zip(one.points, one.band, strict=True))
    there = [f"{across(x):.1f},{up(high):.1f}" for (x, _), (_, high) in rows]
    back = [f"{across(x):.1f},{up(low):.1f}" for (x, _), (low, _) in reversed(rows)]
    return f'<polygon class="s{number} band" points="{" ".join([*there, *back])}"/>'


def _line(one: Series, number: int, across: _Scale, up: _Scale) -> str:
    places = [(across(x), up(y)) for x, y in one.points]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<path class="s{number} line" d="{path}"{_dash(number)}/>'
    for (x, y), (left, value) in zip(places, one.points, strict=True):
        tip = f"{one.name}: {format_number(value)} at {format_number(left)}"
        drawn += f"<g>{_marker(number, x, y)}<title>{escape(tip)}</title></g>"
    return drawn


def _dash(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _marker(number: int, x: float, y: float) -> str:
    style, outline = _MARKS[number % len(_MARKS)]
    return f'<path class="s{number} {style}" d="M{x:.1f},{y:.1f}{outline}"/>'


def _legend(name: str, number: int) -> str:
    x = _LEFT + (number % 2) * (_WIDTH - _LEFT) / 2
    y = _HEIGHT + 8 + (number // 2) * _LEGEND_ROW
    shown = truncate(name, 36)
    return (
        f'<path class="s{number} line" d="M{x:.1f},{y:.1f}h26"{_dash(number)}/>'
        + _marker(number, x + 13, y)
        + f'<text x="{x + 33:.1f}" y="{y + 4:.1f}">{escape(shown)}</text>'
    )


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg></figure>'
    )
