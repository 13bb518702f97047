"""What the page shows, as texts and charts made from values. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stackctl.observe.report import charts
from stackctl.quantity import format_bytes, format_duration
from stackctl.values.bench import BenchReport, Cell, Quantiles, Sample
from stackctl.values.generation import Generation
from stackctl.values.host import Host
from stackctl.values.plan import MemoryBudget, Plan

Rows = tuple[tuple[str, ...], ...]
#: A measured time or speed of a prompt of another length says nothing of the predicted one.
_SAME_LENGTH = 0.15


@dataclass(frozen=True)
class Measured:
    """A stored run with every request of it."""

    run: BenchReport
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class View:
    """The page's parts: tables as their rows, ``tiles`` as (name, value, remark), charts as SVG."""

    title: str
    about: Rows
    tiles: Rows
    slo: Rows
    machine: Rows
    memory: Rows
    expected: Rows
    engine: Rows
    decisions: Rows
    charts: tuple[str, ...]
    cells: Rows
    notes: tuple[str, ...]
    runs: Rows
    comparison: tuple[str, ...]


def view(generation: Generation, latest: Measured | None, runs: Sequence[BenchReport]) -> View:
    """All parts. ``latest`` is the run that is shown in full; ``runs`` those it is compared with,
    oldest first, itself among them."""
    run = latest.run if latest else None
    cells = run.cells if run else ()
    plan = generation.plan
    return View(
        title=f"{generation.stack}: {plan.served_name}",
        about=_about(generation, run),
        tiles=_tiles(cells),
        slo=tuple(
            (result.status, result.name, result.expected or "", result.actual or "")
            for result in (run.results if run else ())
        ),
        machine=machine(generation.host),
        memory=tuple(
            _budget(budget) for budget in (plan.memory, plan.host_memory) if budget is not None
        ),
        expected=expected(plan, cells),
        engine=tuple(
            (fact.name.replace("_", " "), fact.value) for fact in generation.outcome.report
        ),
        decisions=tuple(
            (
                decision.field,
                "(unset)" if decision.value is None else str(decision.value),
                decision.reason,
                decision.source,
            )
            for decision in plan.decisions
        ),
        charts=tuple(filter(None, _charts(latest))) if latest else (),
        cells=tuple(_cell(cell) for cell in cells),
        notes=_notes(run),
        runs=tuple(_run(one) for one in runs) if len(runs) > 1 else (),
        comparison=tuple(filter(None, _comparison(runs))) if len(runs) > 1 else (),
    )


def _about(generation: Generation, run: BenchReport | None) -> Rows:
    plan = generation.plan
    rows = [
        ("profile", f"{plan.profile}, {plan.objective}"),
        ("engine", plan.engine),
        ("model", _model(plan)),
        ("generation", f"{generation.number}, {generation.operation} {_when(generation.created)}"),
        ("image", generation.image),
    ]
    if run is not None:
        what = f"bench {run.id}, {_when(run.when)}, {format_duration(run.seconds)}"
        if run.generation != generation.number:
            what += f", of generation {run.generation}"
        rows.append(("measured", what + ("" if run.complete else ", cut short")))
    return tuple(rows)


def _model(plan: Plan) -> str:
    kind = plan.model.quantization or ""
    return plan.served_name if kind in plan.served_name else f"{plan.served_name}, {kind}"


def _when(text: str) -> str:
    return text[:16].replace("T", " ") + " UTC"


def _tiles(cells: Sequence[Cell]) -> Rows:
    """The few figures one looks for: one request at a time, and all that the stack gives."""
    alone = [cell for cell in cells if cell.shape.concurrency == 1 and not cell.shape.cached]
    rows = []
    speed = _best(alone, "generation_tok_s")
    if speed is not None and speed.generation_tok_s is not None:
        rows.append(("generation", f"{charts.figure(speed.generation_tok_s.p50)} tok/s",
                     "median of one request"))  # fmt: skip
    if speed is not None and speed.performance_factor is not None:
        rows.append(("PF", charts.figure(speed.performance_factor), "tok/s per billion parameters"))
    first = next((cell for cell in alone if cell.ttft_s is not None), None)
    if first is not None and first.ttft_s is not None:
        tokens = round(first.prompt_tokens or first.shape.prompt_tokens)
        rows.append(("first token", f"{charts.figure(first.ttft_s.p95)} s",
                     f"p95 at {tokens:,} tokens"))  # fmt: skip
    most = max((cell for cell in cells if cell.output_tok_s), default=None,
               key=lambda cell: cell.output_tok_s or 0)  # fmt: skip
    if most is not None and most.output_tok_s is not None and most.shape.concurrency > 1:
        rows.append(("throughput", f"{charts.figure(most.output_tok_s)} tok/s",
                     f"{most.shape.concurrency} requests at once"))  # fmt: skip
    return tuple(rows)


def _best(cells: Sequence[Cell], name: str) -> Cell | None:
    found = [(getattr(cell, name), cell) for cell in cells]
    known = [(value.p50, number) for number, (value, _) in enumerate(found) if value is not None]
    return found[max(known)[1]][1] if known else None


def machine(host: Host) -> Rows:
    """The machine in a few rows; what is unknown is left out."""
    cpu, memory, rows = host.cpu, host.memory, []
    if cpu.model:
        cores = f"{cpu.cores} cores" if cpu.cores else ""
        smt = {True: "SMT on", False: "SMT off", None: ""}[cpu.smt]
        nodes = f"{len(cpu.numa)} NUMA nodes" if len(cpu.numa) > 1 else ""
        rows.append(("processor", ", ".join(filter(None, (cpu.model, cores, smt, nodes)))))
    if memory.total_bytes:
        speeds = memory.bandwidth_bytes_s
        parts = [format_bytes(memory.total_bytes)]
        if memory.channels and memory.speed_mt_s:
            parts.append(f"{memory.channels} channels at {memory.speed_mt_s} MT/s")
        if speeds.theoretical:
            parts.append(f"{speeds.theoretical / 1e9:,.0f} GB/s peak")
        if speeds.measured:
            parts.append(f"{speeds.measured / 1e9:,.0f} GB/s measured")
        rows.append(("memory", ", ".join(parts)))
    for gpu in host.gpus:
        size = format_bytes(gpu.memory_bytes) if gpu.memory_bytes else ""
        driver = f"driver {gpu.driver}" if gpu.driver else ""
        rows.append((f"GPU {gpu.index}", ", ".join(filter(None, (gpu.name, size, driver)))))
    tools = host.tools
    system = (tools.os, f"kernel {tools.kernel}" if tools.kernel else "",
              f"podman {tools.podman}" if tools.podman else "",
              f"systemd {tools.systemd}" if tools.systemd else "")  # fmt: skip
    rows.append(("system", ", ".join(filter(None, system))))
    return tuple(rows)


def _budget(budget: MemoryBudget) -> tuple[str, ...]:
    limit = budget.limit_bytes
    return (
        budget.pool,
        format_bytes(budget.weights_bytes),
        format_bytes(budget.kv_bytes),
        format_bytes(budget.compute_bytes),
        format_bytes(budget.total_bytes),
        "" if limit is None else format_bytes(limit),
    )


def expected(plan: Plan, cells: Sequence[Cell]) -> Rows:
    """Predicted against measured: (what, predicted, measured, word), one request at a time."""
    prediction = plan.prediction
    alone = [cell for cell in cells if cell.shape.concurrency == 1 and not cell.shape.cached]
    rows = []
    speed = _best(alone, "generation_tok_s")
    if prediction.decode_tok_s:
        rows.append(_against("generation", prediction.decode_tok_s, "tok/s",
                             speed.generation_tok_s if speed else None, more=True))  # fmt: skip
    if prediction.performance_factor:
        factor = speed.performance_factor if speed else None
        rows.append(_compared("PF", prediction.performance_factor, "", factor, more=True))
    read = _best(alone, "prompt_tok_s")
    if prediction.prefill_tok_s:
        rows.append(_against("prompt", prediction.prefill_tok_s, "tok/s",
                             read.prompt_tok_s if read else None, more=True))  # fmt: skip
    ttft = prediction.ttft_s
    if ttft is not None and ttft.range is not None:
        near = _nearest(alone, ttft.prompt_tokens)
        name = f"first token at {ttft.prompt_tokens:,} tokens"
        rows.append(_against(name, ttft.range, "s", near.ttft_s if near else None, more=False))
    return tuple(rows)


def _nearest(cells: Sequence[Cell], tokens: int) -> Cell | None:
    """The cell whose prompts are about that long."""
    known = [cell for cell in cells if cell.ttft_s is not None and cell.prompt_tokens]
    if not known:
        return None
    best = min(known, key=lambda cell: abs((cell.prompt_tokens or 0) - tokens))
    return best if abs((best.prompt_tokens or 0) - tokens) <= _SAME_LENGTH * tokens else None


def _against(
    name: str, low_high: tuple[float, float], unit: str, seen: Quantiles | None, *, more: bool
) -> tuple[str, ...]:
    return _compared(name, low_high, unit, seen.p50 if seen else None, more=more)


def _compared(
    name: str, low_high: tuple[float, float], unit: str, seen: float | None, *, more: bool
) -> tuple[str, ...]:
    low, high = low_high
    predicted = f"{charts.figure(low)}-{charts.figure(high)} {unit}".strip()
    if seen is None:
        return (name, predicted, "not measured", "")
    above, below = ("better", "worse") if more else ("worse", "better")
    word = above if seen > high else below if seen < low else "as predicted"
    return (name, predicted, f"{charts.figure(seen)} {unit}".strip(), word)


def _charts(latest: Measured) -> list[str]:
    cells = latest.run.cells
    fresh = [cell for cell in cells if not cell.shape.cached]
    found = [
        charts.lines(
            "Whole answer, by its length",
            [
                _series(f"{_tokens(prompt)} in, p50", group, "e2e_s")
                for prompt, group in _grouped(fresh, "prompt_tokens", concurrency=1).items()
            ],
            x_label="tokens of the answer",
            y_label="seconds",
        ),
        charts.lines(
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
    answered = [sample for sample in latest.samples if sample.error is None]
    firsts = [sample.ttft_s for sample in answered if sample.ttft_s is not None]
    gaps = [gap for sample in answered for gap in sample.gaps_ms]
    found.append(charts.histogram("First token, all requests", firsts, x_label="seconds"))
    found.append(charts.histogram("Between tokens, all requests", gaps, x_label="milliseconds"))
    return found


def _throughput(cells: Sequence[Cell]) -> list[str]:
    """Tokens a second over concurrency, for the shape that was measured with most of them."""
    groups: dict[tuple[int, int], list[Cell]] = {}
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
        charts.lines("Throughput of all requests", everyone, x_label=label, y_label="tok/s"),
        charts.lines("Speed of each request (p50)", each, x_label=label, y_label="tok/s"),
    ]


def _grouped(cells: Sequence[Cell], key: str, *, concurrency: int) -> Mapping[int, list[Cell]]:
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.shape.concurrency == concurrency:
            groups.setdefault(getattr(cell.shape, key), []).append(cell)
    return dict(sorted(groups.items()))


def _series(name: str, cells: Sequence[Cell], figure: str) -> charts.Series:
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
    cells: Sequence[Cell],
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """TTFT by prompt length, of the shortest answers: their length does not matter to it."""
    shortest: dict[int, Cell] = {}
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


def _cell(cell: Cell) -> tuple[str, ...]:
    """A row of the table of all cells."""
    shape = cell.shape
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    return (
        f"{shape.prompt_tokens:,}" + (" cached" if shape.cached else ""),
        f"{shape.output_tokens:,}",
        str(shape.concurrency),
        f"{cell.requests}{failed}",
        _three(cell.ttft_s),
        _three(cell.itl_ms),
        _three(cell.generation_tok_s),
        "" if cell.output_tok_s is None else charts.figure(cell.output_tok_s),
        _three(cell.e2e_s),
        "" if cell.goodput is None else f"{100 * cell.goodput:.0f} %",
    )


def _three(value: Quantiles | None) -> str:
    if value is None:
        return ""
    return " / ".join(charts.figure(one) for one in (value.p50, value.p95, value.p99))


def _notes(run: BenchReport | None) -> tuple[str, ...]:
    if run is None:
        return ()
    found = [note for cell in run.cells for note in cell.notes]
    if run.client is not None and run.client.limited:
        found.append("the client may have set the pace, not the engine")
    if run.lengths == "estimated":
        found.append("the lengths of prompts are estimates: the engine has no tokenizer to ask")
    return tuple(dict.fromkeys(found))


def _run(run: BenchReport) -> tuple[str, ...]:
    """A row of the comparison of runs."""
    alone = [cell for cell in run.cells if cell.shape.concurrency == 1 and not cell.shape.cached]
    speed = _best(alone, "generation_tok_s")
    first = next((cell.ttft_s for cell in alone if cell.ttft_s is not None), None)
    most = max((cell.output_tok_s or 0.0 for cell in run.cells), default=0.0)
    return (
        f"{run.id}",
        f"{run.generation}",
        run.objective,
        run.model,
        _when(run.when),
        charts.figure(speed.generation_tok_s.p50) if speed and speed.generation_tok_s else "",
        charts.figure(first.p95) if first else "",
        charts.figure(most) if most else "",
    )


def _comparison(runs: Sequence[BenchReport]) -> list[str]:
    """Throughput over concurrency, one line a run."""
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
        alone = [c for c in run.cells if c.shape.concurrency == 1 and not c.shape.cached]
        singles.append(charts.Series(name, _points(alone)[0]))
    return [
        charts.lines("Throughput, run by run", series,
                     x_label="requests at the same time", y_label="tok/s"),
        charts.lines("First token (p50), run by run", singles,
                     x_label="tokens of the prompt", y_label="seconds"),
    ]  # fmt: skip
