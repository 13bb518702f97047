"""The parts of a page as texts and charts, made from values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.observe.report import chart_data
from stackctl.quantity import format_bytes, format_duration, format_number, format_share
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, RequestSample
from stackctl.values.generation import Generation
from stackctl.values.host import Host
from stackctl.values.plan import MemoryBudget, Plan

Rows = tuple[tuple[str, ...], ...]
#: A measured TTFT is compared with the predicted one if the prompt lengths differ by less than
#: this.
_SAME_LENGTH = 0.15


@dataclass(frozen=True)
class StoredRun:
    """A stored run with all its requests."""

    run: BenchReport
    samples: tuple[RequestSample, ...]


@dataclass(frozen=True)
class View:
    """The parts of a page: tables as rows, ``tiles`` as (name, value, remark), charts as SVG."""

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


def build_view(
    generation: Generation, latest: StoredRun | None, runs: Sequence[BenchReport]
) -> View:
    """Return all parts of a page.

    ``latest`` is the run that is shown in full. ``runs`` are the runs in the comparison, oldest
    first, with ``latest`` among them.
    """
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
        machine=machine_rows(generation.host),
        memory=tuple(
            _budget(budget) for budget in (plan.memory, plan.host_memory) if budget is not None
        ),
        expected=predicted_vs_measured(plan, cells),
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
        charts=tuple(filter(None, chart_data.run_charts(latest.run, latest.samples)))
        if latest
        else (),
        cells=tuple(_cell(cell) for cell in cells),
        notes=_notes(run),
        runs=tuple(_run(one) for one in runs) if len(runs) > 1 else (),
        comparison=tuple(filter(None, chart_data.comparison_charts(runs))) if len(runs) > 1 else (),
    )


def _about(generation: Generation, run: BenchReport | None) -> Rows:
    plan = generation.plan
    rows = [
        ("profile", f"{plan.profile}, {plan.objective}"),
        ("engine", plan.engine),
        ("model", _model(plan)),
        (
            "generation",
            f"{generation.number}, {generation.operation} {format_time(generation.created)}",
        ),
        ("image", generation.image),
    ]
    if run is not None:
        what = f"bench {run.id}, {format_time(run.when)}, {format_duration(run.seconds)}"
        if run.generation != generation.number:
            what += f", of generation {run.generation}"
        rows.append(("measured", what + ("" if run.complete else ", cut short")))
    return tuple(rows)


def _model(plan: Plan) -> str:
    kind = plan.model.quantization or ""
    return plan.served_name if kind in plan.served_name else f"{plan.served_name}, {kind}"


def format_time(text: str) -> str:
    """Return a stored time (ISO 8601, UTC) for display, without its seconds."""
    return text[:16].replace("T", " ") + " UTC"


def _tiles(cells: Sequence[BenchCell]) -> Rows:
    """Return the key figures: those of one request at a time, and the highest throughput."""
    alone = [cell for cell in cells if cell.shape.is_single_uncached]
    rows = []
    speed = _best(alone, "generation_tok_s")
    if speed is not None and speed.generation_tok_s is not None:
        rows.append(("generation", f"{format_number(speed.generation_tok_s.p50)} tok/s",
                     "median of one request"))  # fmt: skip
    if speed is not None and speed.performance_factor is not None:
        rows.append(("PF", format_number(speed.performance_factor), "tok/s per billion parameters"))
    first = next((cell for cell in alone if cell.ttft_s is not None), None)
    if first is not None and first.ttft_s is not None:
        tokens = round(first.prompt_tokens or first.shape.prompt_tokens)
        rows.append(("first token", f"{format_number(first.ttft_s.p95)} s",
                     f"p95 at {tokens:,} tokens"))  # fmt: skip
    most = max((cell for cell in cells if cell.output_tok_s), default=None,
               key=lambda cell: cell.output_tok_s or 0)  # fmt: skip
    if most is not None and most.output_tok_s is not None and most.shape.concurrency > 1:
        rows.append(("throughput", f"{format_number(most.output_tok_s)} tok/s",
                     f"{most.shape.concurrency} requests at once"))  # fmt: skip
    return tuple(rows)


def _best(cells: Sequence[BenchCell], name: str) -> BenchCell | None:
    found = [(getattr(cell, name), cell) for cell in cells]
    known = [(value.p50, number) for number, (value, _) in enumerate(found) if value is not None]
    return found[max(known)[1]][1] if known else None


def machine_rows(host: Host) -> Rows:
    """Return the facts of a machine as rows; unknown facts are left out."""
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


def predicted_vs_measured(plan: Plan, cells: Sequence[BenchCell]) -> Rows:
    """Compare predictions with measurements of one request at a time.

    Each row is (name, predicted, measured, verdict).
    """
    prediction = plan.prediction
    alone = [cell for cell in cells if cell.shape.is_single_uncached]
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


def _nearest(cells: Sequence[BenchCell], tokens: int) -> BenchCell | None:
    """Return the cell with prompts of about that length; None without one."""
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
    predicted = f"{format_number(low)}-{format_number(high)} {unit}".strip()
    if seen is None:
        return (name, predicted, "not measured", "")
    above, below = ("better", "worse") if more else ("worse", "better")
    word = above if seen > high else below if seen < low else "as predicted"
    return (name, predicted, f"{format_number(seen)} {unit}".strip(), word)


def _cell(cell: BenchCell) -> tuple[str, ...]:
    """Return a cell as a row of the table of cells."""
    workload = cell.shape
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    return (
        f"{workload.prompt_tokens:,}" + (" cached" if workload.cached else ""),
        f"{workload.output_tokens:,}",
        str(workload.concurrency),
        f"{cell.requests}{failed}",
        _three(cell.ttft_s),
        _three(cell.itl_ms),
        _three(cell.generation_tok_s),
        "" if cell.output_tok_s is None else format_number(cell.output_tok_s),
        _three(cell.e2e_s),
        "" if cell.goodput is None else format_share(cell.goodput),
    )


def _three(value: Quantiles | None) -> str:
    if value is None:
        return ""
    return " / ".join(format_number(one) for one in (value.p50, value.p95, value.p99))


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
    """Return a run as a row of the table of runs."""
    alone = [cell for cell in run.cells if cell.shape.is_single_uncached]
    speed = _best(alone, "generation_tok_s")
    first = next((cell.ttft_s for cell in alone if cell.ttft_s is not None), None)
    most = max((cell.output_tok_s or 0.0 for cell in run.cells), default=0.0)
    return (
        f"{run.id}",
        f"{run.generation}",
        run.objective,
        run.model,
        format_time(run.when),
        format_number(speed.generation_tok_s.p50) if speed and speed.generation_tok_s else "",
        format_number(first.p95) if first else "",
        format_number(most) if most else "",
    )
