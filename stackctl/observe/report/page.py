"""The page of a stack, made from its plan and the stored measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackctl import __version__
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import write_atomically
from stackctl.observe.report import charts
from stackctl.quantity import format_bytes, format_duration, format_number, format_share
from stackctl.resources import data_folder
from stackctl.state.bench_db import BenchDatabase
from stackctl.state.generations import utc_now
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, RequestSample
from stackctl.values.generation import Generation
from stackctl.values.host import Host
from stackctl.values.plan import MemoryBudget, Plan

Rows = tuple[tuple[str, ...], ...]
#: Pages begin with this mark, so that no other file is overwritten.
MARK = "<!-- stackctl report -->"
#: The most runs in the comparison.
_MOST_RUNS = 6
#: A measured TTFT is compared with the predicted one if the prompt lengths differ by less than
#: this.
_SAME_LENGTH = 0.15


def report_html(context: Context, generation: Generation) -> str:
    """Return the page of a stack as HTML.

    It shows one run in full: the newest of this generation, else the newest of the stack. Beside it
    stand the newest runs of the other generations.

    Raises:
        StackctlError: the stored measurements cannot be read.
    """
    benches = BenchDatabase(context.paths.state)
    stored = [run for run in benches.reports(generation.stack) if run.has_answers and not run.box]
    shown = next((run for run in stored if run.generation == generation.number), None)
    shown = shown or next(iter(stored), None)
    samples = benches.samples(shown.id) if shown is not None and shown.id is not None else ()
    return render_page(generation, page_parts(generation, shown, samples, _beside(stored, shown)))


def render_page(generation: Generation, parts: dict[str, Any]) -> str:
    """Return the parts of a page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    basis = generation.plan.prediction.basis
    return environment.get_template("report.html.j2").render(
        view=parts,
        stack=generation.stack,
        basis={"measured": "from measurements of this machine"}.get(basis or "", "estimates"),
        version=__version__,
        made=_format_time(utc_now()),
    )


def _beside(stored: list[BenchReport], shown: BenchReport | None) -> tuple[BenchReport, ...]:
    """Return the newest run of each generation, oldest first; ``stored`` is newest first."""
    newest: dict[int, BenchReport] = {}
    for run in ([shown] if shown else []) + stored:
        newest.setdefault(run.generation, run)
    ordered = sorted(newest.values(), key=lambda run: run.id or 0)
    return tuple(ordered[-_MOST_RUNS:])


def write_page(path: Path, text: str) -> None:
    """Write a page to a new file or over an earlier page.

    Raises:
        StackctlError: exit 5 if another file is there; exit 1 if the page cannot be written.
    """
    try:
        with path.open("rb") as stream:
            ours = MARK.encode() in stream.read(200)
    except FileNotFoundError:
        ours = True
    except OSError as error:
        raise StackctlError(f"cannot write {path}: {error.strerror}") from None
    if not ours:
        raise StackctlError(
            f"{path} exists and is not a report",
            hint="-o FILE names another",
            exit_code=ExitCode.REFUSED,
        )
    write_atomically(path, text)


def page_parts(
    generation: Generation,
    run: BenchReport | None,
    samples: Sequence[RequestSample],
    runs: Sequence[BenchReport],
) -> dict[str, Any]:
    """Return the parts of a page for its template.

    Tables are rows, ``tiles`` are (name, value, remark), charts are SVG.

    Args:
        generation: the stack, with its plan and its machine.
        run: the run that is shown in full; None if nothing was measured.
        samples: all requests of that run.
        runs: the runs in the comparison, oldest first, with ``run`` among them.
    """
    cells = run.cells if run else ()
    plan = generation.plan
    compared = runs if len(runs) > 1 else ()
    return {
        "title": f"{generation.stack}: {plan.served_name}",
        "about": _about(generation, run),
        "tiles": _tiles(cells),
        "slo": [
            (result.status, result.name, result.expected or "", result.actual or "")
            for result in (run.results if run else ())
        ],
        "machine": _machine_rows(generation.host),
        "memory": [_budget(budget) for budget in (plan.memory, plan.host_memory) if budget],
        "expected": _predicted_vs_measured(plan, cells),
        "engine": [(fact.name.replace("_", " "), fact.value) for fact in generation.outcome.report],
        "decisions": [
            (one.field, "(unset)" if one.value is None else str(one.value), one.reason, one.source)
            for one in plan.decisions
        ],
        "charts": charts.run_charts(run, samples) if run else [],
        "cells": [_cell(cell) for cell in cells],
        "notes": _notes(run),
        "runs": [_run(one) for one in compared],
        "comparison": charts.comparison_charts(compared) if compared else [],
    }


def _about(generation: Generation, run: BenchReport | None) -> Rows:
    plan = generation.plan
    rows = [
        ("profile", f"{plan.profile}, {plan.objective}"),
        ("engine", plan.engine),
        ("model", _model(plan)),
        (
            "generation",
            f"{generation.number}, {generation.operation} {_format_time(generation.created)}",
        ),
        ("image", generation.image),
    ]
    if run is not None:
        what = f"bench {run.id}, {_format_time(run.when)}, {format_duration(run.seconds)}"
        if run.generation != generation.number:
            what += f", of generation {run.generation}"
        rows.append(("measured", what + ("" if run.complete else ", cut short")))
    return tuple(rows)


def _model(plan: Plan) -> str:
    kind = plan.model.quantization or ""
    return plan.served_name if kind in plan.served_name else f"{plan.served_name}, {kind}"


def _format_time(text: str) -> str:
    """Return a stored time (ISO 8601, UTC) for display, without its seconds."""
    return text[:16].replace("T", " ") + " UTC"


def _tiles(cells: Sequence[BenchCell]) -> Rows:
    """Return the key figures: those of one request at a time, and the highest throughput."""
    alone = [cell for cell in cells if cell.shape.is_single_uncached]
    rows = []
    speed = _best(alone, "generation_tok_s")
    if (median := _median(speed, "generation_tok_s")) is not None:
        rows.append(("generation", f"{format_number(median)} tok/s", "median of one request"))
    if speed is not None and speed.performance_factor is not None:
        rows.append(("PF", format_number(speed.performance_factor), "tok/s per billion parameters"))
    first = next((cell for cell in alone if cell.ttft_s is not None), None)
    if first is not None and first.ttft_s is not None:
        tokens = round(first.prompt_tokens or first.shape.prompt_tokens)
        rows.append(("first token", f"{format_number(first.ttft_s.p95)} s",
                     f"p95 at {tokens:,} tokens"))  # fmt: skip
    most = max(cells, default=None, key=lambda cell: cell.output_tok_s or 0)
    if most is not None and most.output_tok_s and most.shape.concurrency > 1:
        rows.append(("throughput", f"{format_number(most.output_tok_s)} tok/s",
                     f"{most.shape.concurrency} requests at once"))  # fmt: skip
    return tuple(rows)


def _best(cells: Sequence[BenchCell], name: str) -> BenchCell | None:
    found = [(getattr(cell, name), cell) for cell in cells]
    known = [(value.p50, number) for number, (value, _) in enumerate(found) if value is not None]
    return found[max(known)[1]][1] if known else None


def _machine_rows(host: Host) -> Rows:
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


def _predicted_vs_measured(plan: Plan, cells: Sequence[BenchCell]) -> Rows:
    """Compare predictions with measurements of one request at a time.

    Each row is (name, predicted, measured, verdict).
    """
    prediction, ttft = plan.prediction, plan.prediction.ttft_s
    alone = [cell for cell in cells if cell.shape.is_single_uncached]
    speed = _best(alone, "generation_tok_s")
    factor = speed.performance_factor if speed else None
    read = _median(_best(alone, "prompt_tok_s"), "prompt_tok_s")
    rows = [
        _compared("generation", prediction.decode_tok_s, "tok/s",
                  _median(speed, "generation_tok_s"), more=True),
        _compared("PF", prediction.performance_factor, "", factor, more=True),
        _compared("prompt", prediction.prefill_tok_s, "tok/s", read, more=True),
    ]  # fmt: skip
    if ttft is not None:
        first = _median(_nearest(alone, ttft.prompt_tokens), "ttft_s")
        name = f"first token at {ttft.prompt_tokens:,} tokens"
        rows.append(_compared(name, ttft.range, "s", first, more=False))
    return tuple(row for row in rows if row)


def _median(cell: BenchCell | None, name: str) -> float | None:
    value = getattr(cell, name) if cell else None
    return value.p50 if value else None


def _nearest(cells: Sequence[BenchCell], tokens: int) -> BenchCell | None:
    """Return the cell with prompts of about that length; None without one."""
    known = [cell for cell in cells if cell.ttft_s is not None and cell.prompt_tokens]
    if not known:
        return None
    best = min(known, key=lambda cell: abs((cell.prompt_tokens or 0) - tokens))
    return best if abs((best.prompt_tokens or 0) - tokens) <= _SAME_LENGTH * tokens else None


def _compared(
    name: str, low_high: tuple[float, float] | None, unit: str, seen: float | None, *, more: bool
) -> tuple[str, ...]:
    """Return a row; empty if nothing was predicted."""
    if not low_high:
        return ()
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
        _format_time(run.when),
        format_number(speed.generation_tok_s.p50) if speed and speed.generation_tok_s else "",
        format_number(first.p95) if first else "",
        format_number(most) if most else "",
    )
