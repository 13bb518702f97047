"""The commands that plan without a start: plan, render, calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import duration_option, facts_option, plan_options, profile_argument
from stackctl.cli.output import WIDTH
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes

if TYPE_CHECKING:
    from stackctl.deploy.planning import PlanBasis, PlanPreview
    from stackctl.values.generation import UnitFile
    from stackctl.values.history import FieldChange
    from stackctl.values.plan import MemoryBudget, Plan
    from stackctl.values.profile import Overrides, Profile, Slo

_COLUMN = 10


@stackctl_command("plan")
@profile_argument
@plan_options
@facts_option
@click.option("--explain", is_flag=True, help="Show every value with its reason.")
@click.option(
    "--diff",
    type=click.Choice(["latency", "throughput"]),
    help="Show the differences from the plan for that objective.",
)
def plan(
    session: Session,
    profile: str,
    asked: Overrides,
    facts: Path | None,
    explain: bool,
    diff: str | None,
) -> None:
    """Show the plan for PROFILE: memory, predicted speed, verdict and reasons.

    Changes nothing. Exits 5 when the plan does not fit or is not viable, but prints it.
    """
    import msgspec

    from stackctl.deploy.planning import preview
    from stackctl.plan.verdict import refusal

    profiles = session.profiles()
    wanted = profiles.resolve(profile, asked)
    basis = session.plan_basis(facts)
    plan = preview(basis, profiles, wanted, session.out).plan
    if not session.out.wrote_json(plan):
        show(session, plan, wanted.slo)
        if diff is not None:
            other = profiles.resolve(profile, msgspec.structs.replace(asked, objective=diff))
            show_difference(session, preview(basis, profiles, other, session.out).plan, plan)
        elif explain:
            show_decisions(session, plan)
        else:
            session.out.note(f"every value and its reason: stackctl plan {plan.profile} --explain")
    if plan.verdict.fits is False or plan.verdict.viable is False:
        if session.out.json:
            raise click.exceptions.Exit(int(ExitCode.REFUSED))
        headline, reasons = refusal(plan)
        raise StackctlError(
            headline,
            details=reasons,
            hint="\n".join(("what helps, best first", *plan.verdict.alternatives)),
            exit_code=ExitCode.REFUSED,
        )


def show(session: Session, plan: Plan, slo: Slo) -> None:
    """Print a plan in a few lines: memory, speed, objectives and the place where it runs."""
    from stackctl.engines import planned_threads
    from stackctl.plan.verdict import failing_reasons, objective_status

    out = session.out
    out.line(f"{plan.profile} · {plan.objective} · {plan.engine} · {plan.served_name}"[:WIDTH])
    label, color = {True: ("fits", "green"), False: ("too big", "red"), None: ("memory", "yellow")}[
        plan.verdict.fits
    ]
    budgets = [plan.memory] + ([plan.host_memory] if plan.host_memory else [])
    for number, budget in enumerate(budgets):
        pool = f"{budget.pool}: " if plan.placement.gpus else ""
        text = pool + _budget(budget)
        out.labelled("" if number else label, text, column=_COLUMN, color=color)
    for number, text in enumerate(prediction_lines(plan)):
        out.labelled("" if number else "expect", text, column=_COLUMN)
    if judged := objective_status(slo, plan.prediction):
        color = {"ok": "green", "missed": "red"}.get(judged[0][1], "yellow")
        text = "; ".join(f"{what}: {how}" for what, how in judged)
        out.labelled("SLO", text, column=_COLUMN, color=color)
    if plan.verdict.fits is not False and plan.verdict.viable is not False:
        for text in failing_reasons(plan):
            out.labelled("note", text, column=_COLUMN, color="yellow")
    threads = planned_threads(plan)
    where = f"GPU {','.join(plan.placement.gpus)}" if plan.placement.gpus else "CPU"
    parts = [where, f"{threads} threads" if threads else None, f"port {plan.port}", plan.image]
    out.labelled("runs", ", ".join(part for part in parts if part), column=_COLUMN)


def show_decisions(session: Session, plan: Plan) -> None:
    """Print every planned value with its reason."""
    from stackctl.plan.plan_diff import reason_with_source

    session.out.line()
    rows = [(d.field, value_text(d.value), reason_with_source(d)) for d in plan.decisions]
    session.out.table(("FIELD", "VALUE", "WHY"), rows, fold=2)


def show_difference(session: Session, before: Plan, after: Plan) -> None:
    """Print the differing decisions of two plans, with the reasons of the second."""
    from stackctl.plan.plan_diff import changed_decisions

    rows = change_rows(changed_decisions(before, after))
    session.out.line()
    if not rows:
        session.out.line(f"nothing differs between {before.objective} and {after.objective}")
        return
    session.out.table(
        ("FIELD", before.objective.upper(), after.objective.upper(), "WHY"), rows, fold=3
    )


def change_rows(changes: Sequence[FieldChange]) -> list[tuple[str, ...]]:
    """Return changed decisions as rows: field, value before, value after, reason."""
    return [(c.field, value_text(c.before), value_text(c.after), c.reason or "") for c in changes]


def prediction_lines(plan: Plan) -> list[str]:
    """Return the prediction as lines of text; an empty list if there is none."""
    from stackctl.plan.verdict import format_range

    prediction, parts = plan.prediction, []
    if prediction.decode_tok_s:
        parts.append(f"{format_range(prediction.decode_tok_s)} tok/s")
    ttft = prediction.ttft_s
    if ttft is not None and ttft.range is not None:
        parts.append(f"first token {format_range(ttft.range)} s at {ttft.prompt_tokens:,} tokens")
    if not parts:
        return []
    lines = [f"{', '.join(parts)}   ({prediction.basis})"]
    if factor := prediction.performance_factor:
        low, high = (f"{end:.2g}" if end < 10 else f"{end:,.0f}" for end in factor)
        lines.append(f"PF {low}-{high} (tok/s for each billion parameters)")
    return lines


def _budget(budget: MemoryBudget) -> str:
    """Return the parts of a budget, in the unit of its total, and its limit as text."""
    total, unit = format_bytes(budget.total_bytes).split()
    size = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    named = (
        ("weights", budget.weights_bytes),
        ("engine", budget.compute_bytes - budget.cache_bytes),
        ("KV", budget.kv_bytes),
        ("cache", budget.cache_bytes),
    )
    parts = [f"{name} {count / size:.1f}" for name, count in named if count]
    limit, of = budget.limit_bytes, ""
    if limit is not None:
        shown, limit_unit = format_bytes(limit).split()
        of = f" of {shown}" if limit_unit == unit else f" {unit} of {shown}"
        unit = limit_unit
    equals = f" = {total}" if len(parts) > 1 else ""
    basis = "   (measured)" if budget.basis == "measured" else ""
    return f"{' + '.join(parts) or '0'}{equals}{of} {unit}{basis}"


def value_text(value: object) -> str:
    """Return a planned value as text."""
    if value is None:
        return "(unset)"
    return str(value).lower() if isinstance(value, bool) else str(value)


@stackctl_command("render")
@profile_argument
@plan_options
@facts_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write to; default: stdout."
)
def render(
    session: Session, profile: str, asked: Overrides, facts: Path | None, output: Path | None
) -> None:
    """Write the units of PROFILE without installing or starting anything."""
    from stackctl.deploy.planning import preview, unit_target
    from stackctl.units.render import render_units
    from stackctl.values.generation import UnitsReport

    profiles = session.profiles()
    resolved = profiles.resolve(profile, asked)
    basis = session.plan_basis(facts)
    planned = preview(basis, profiles, resolved, session.out)
    image = planned.image
    if image.facts is None:
        session.out.warn(
            f"image {image.reference} was not looked at: not pinned, and its options not checked"
        )
    target = unit_target(basis.paths, basis.host, planned.plan, image.facts)
    units = render_units(planned.plan, target, 0)
    files = (*units.files, *_door_files(basis, resolved, planned))
    if session.out.json:
        report = UnitsReport(stack=units.stack, service=units.service, files=files)
        session.out.data(report)
    _write_units(session, files, output)


def _door_files(basis: PlanBasis, profile: Profile, planned: PlanPreview) -> tuple[UnitFile, ...]:
    """Return the unit and the files of the front door; empty for a stack without a door."""
    from stackctl.units.proxy_unit import make_proxy, render_proxy

    if planned.door is None:
        return ()
    stack = planned.plan.stack
    made = render_proxy(
        stack,
        make_proxy(profile, planned.plan, planned.door),
        scope=basis.paths.scope,
        podman=basis.host.tools.podman,
        folder=str(basis.paths.proxy_folder(stack)),
        apparmor=basis.host.tools.apparmor is True,
    )
    return (made.unit, *made.files)


def _write_units(session: Session, files: tuple[UnitFile, ...], output: Path | None) -> None:
    """Print the files, or write them to a folder and print their names; with --json print none."""
    from stackctl.machine.files import write_atomically

    for file in files:
        text = file.text.rstrip("\n")
        if output is not None:
            if output.exists() and not output.is_dir():
                raise StackctlError(f"{output} is not a folder", exit_code=ExitCode.USAGE)
            write_atomically(output / file.name, file.text)
            text = str(output / file.name)
        if not session.out.json:
            session.out.line(text)


@stackctl_command("calibrate")
@profile_argument
@plan_options
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Number of threads; default: the plan's."
)
@duration_option("--timeout", "How long the benchmark may take; default 5m.")
def calibrate(
    session: Session, profile: str, asked: Overrides, threads: int | None, timeout: float | None
) -> None:
    """Measure what this machine achieves with PROFILE's model.

    If the engine's image has a benchmark, it is run: stop other load first. Otherwise the
    measurement reads the counters of the engine that runs on the profile's port. Plans of similar
    models are then based on it: "measured", not "estimated".
    """
    from stackctl.observe.calibrate import calibrate as measure
    from stackctl.quantity import format_number

    resolved = session.profiles().resolve(profile, asked)
    entry = measure(session.context(), resolved, timeout_s=timeout or 300, threads=threads)
    if session.out.wrote_json(entry):
        return
    where = entry.gpu or f"{entry.threads} threads"
    session.out.line(f"{entry.model} · {entry.quantization} · {where}")
    for name, speed, work in (
        ("generation", entry.decode_tok_s, f"{format_number(entry.decode_bytes_s / 1e9)} GB/s"),
        ("prompt", entry.prefill_tok_s, f"{format_number(entry.prefill_flops / 1e12)} TFLOP/s"),
    ):
        session.out.labelled(name, f"{format_number(speed)} tok/s, {work}", indent=2, column=14)
