"""Tables of bench runs and of their comparison."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.cli.output import Output
from stackctl.quantity import format_duration, format_number, format_share, truncate
from stackctl.values.bench import (
    BenchCell,
    BenchComparison,
    BenchEntry,
    BenchReport,
    CellDifference,
    Quantiles,
    Workload,
)

#: Most characters of a model's name in a list.
_NAME = 24
_FIGURES = {"ttft_s": "first s", "generation_tok_s": "tok/s", "e2e_s": "whole s"}


def show_run(out: Output, report: BenchReport) -> None:
    """Print a run: its stack and model, its cells, notes on them, and the results for the SLO."""
    number = f"bench {report.id}" if report.id is not None else "bench"
    where = f"{report.stack} of {report.box}, from here," if report.box else report.stack
    out.line(
        f"{number} · {where} generation {report.generation} · {report.objective} · {report.engine}"
    )
    out.line(report.model)
    cut = "" if report.complete else ", not complete"
    by = "" if report.tool == "stackctl" else f", by {report.tool}"
    out.line(f"{report.when}, {format_duration(report.seconds)}{cut}{by}")
    out.line()
    head = ("IN", "OUT", "AT ONCE", "FIRST TOKEN s", "BETWEEN ms", "TOK/S", "ALL", "PROMPT",
            "n")  # fmt: skip
    rows = [_row(cell) for cell in report.cells]
    _columns(out, head, rows)
    out.line()
    out.line("first token and between tokens: p50/p95/p99 · tok/s: median of a request")
    out.line("all: those at once together · prompt: tok/s to first token · c: prefix cached")
    _details(out, report)
    if report.results:
        out.line()
        out.results(report.results)


def show_runs(out: Output, entries: Sequence[BenchEntry]) -> None:
    """Print the list of stored runs."""
    rows = [
        (str(entry.id), entry.when[:16].replace("T", " "),
         f"{entry.stack} {entry.generation}" + (f" of {entry.box}" if entry.box else ""),
         truncate(entry.model, _NAME),
         _number(entry.generation_tok_s),
         f"{entry.cells}" + ("" if entry.complete else " (cut)")
         + ("" if entry.tool == "stackctl" else f" {entry.tool}"))
        for entry in entries
    ]  # fmt: skip
    _columns(out, ("ID", "WHEN (UTC)", "STACK", "MODEL", "TOK/S", "CELLS"), rows)


def show_comparison(out: Output, found: BenchComparison) -> None:
    """Print two runs: a line for each figure of each cell, then the cells of only one run."""
    out.line(f"bench {found.before} -> {found.after}")
    for text in found.differs:
        out.line(f"  {text}")
    out.line()
    rows = [_difference(difference) for difference in found.differences]
    _columns(out, ("CELL", "FIGURE", "BEFORE", "AFTER", "CHANGE", "95 % INTERVAL", ""), rows)
    for shapes, number in ((found.only_before, found.before), (found.only_after, found.after)):
        if shapes:
            cells = ", ".join(_cell(workload) for workload in shapes)
            out.line(f"only in bench {number}: {cells}")


def _row(cell: BenchCell) -> tuple[str, ...]:
    workload = cell.shape
    return (
        _tokens(cell.prompt_tokens, workload.prompt_tokens) + ("c" if workload.cached else ""),
        _tokens(cell.output_tokens, workload.output_tokens),
        str(workload.concurrency),
        _three(cell.ttft_s),
        _three(cell.itl_ms),
        _number(cell.generation_tok_s.p50 if cell.generation_tok_s else None),
        _number(cell.output_tok_s),
        _number(cell.prompt_tok_s.p50 if cell.prompt_tok_s else None),
        f"{cell.requests - cell.failed}",
    )


def _details(out: Output, report: BenchReport) -> None:
    told = []
    factors = [cell.performance_factor for cell in report.cells if cell.performance_factor]
    if factors and report.parameters:
        told.append(
            f"PF        {_number(max(factors))} (tok/s over {report.parameters / 1e9:.3g} billion "
            "parameters, the best cell)"
        )
    for cell in report.cells:
        if cell.shape.cached and cell.cached_tokens is not None and cell.prompt_tokens:
            share = format_share(cell.cached_tokens / cell.prompt_tokens)
            told.append(
                f"cached    {cell.cached_tokens:,.0f} of {cell.prompt_tokens:,.0f} prompt tokens "
                f"({share})"
            )
    ends = [(cell, cell.e2e_s) for cell in report.cells if cell.e2e_s and not cell.shape.cached]
    told += [f"whole     {_cell(cell.shape)}: {_three(value)} s" for cell, value in ends[:1]]
    goods = [cell.goodput for cell in report.cells if cell.goodput is not None]
    if goods:
        told.append(f"goodput   {format_share(min(goods))} within the slo, in the worst cell")
    if report.lengths == "estimated":
        told.append("lengths   estimated: the engine has no tokenizer endpoint")
    for cell in report.cells:
        told += [f"note      {_cell(cell.shape)}: {note}" for note in cell.notes]
    for text in dict.fromkeys(told):
        out.line(text)


def _difference(one: CellDifference) -> tuple[str, ...]:
    change = interval = "-"
    if one.ratio is not None:
        middle, low, high = (100 * (value - 1) for value in one.ratio)
        change, interval = f"{middle:+.1f} %", f"{low:+.1f} to {high:+.1f} %"
    else:
        interval = f"{one.n[0]} and {one.n[1]} values"
    return (
        _cell(one.shape), _FIGURES[one.figure], format_number(one.before),
        format_number(one.after), change, interval, one.word,
    )  # fmt: skip


def _cell(workload: Workload) -> str:
    mark = "c" if workload.cached else ""
    return f"{workload.prompt_tokens}{mark}/{workload.output_tokens}x{workload.concurrency}"


def _columns(out: Output, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    for row in (head, *rows):
        cells = (f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        out.line("  ".join(cells).rstrip())


def _tokens(measured: float | None, asked: int) -> str:
    return f"{asked if measured is None else measured:.0f}"


def _three(value: Quantiles | None) -> str:
    return "-" if value is None else "/".join(_number(v) for v in (value.p50, value.p95, value.p99))


def _number(value: float | None) -> str:
    return "-" if value is None else format_number(value)
