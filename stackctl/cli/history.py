"""The record of a stack: history, diff, prune, and its page (report)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_and_numbers, stack_argument, yes_option
from stackctl.cli.plan import change_rows, value_text
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.values.history import AuditEntry, DiffReport, HistoryEntry


@stackctl_command("history")
@stack_argument
@click.option("--log", is_flag=True, help="Show who changed what and how it went, oldest first.")
def history(session: Session, stack: str | None, log: bool) -> None:
    """List the generations of STACK, newest first; * marks the installed one.

    HEALTH is the result of the last check. The log of generation N: stackctl logs --generation N
    """
    from stackctl.observe.history import audit_report, history_report

    context = session.context(recover="try")
    if log:
        audit = audit_report(context, stack)
        if session.out.json:
            session.out.data(audit)
        elif not audit.entries:
            session.out.note("nothing was changed yet")
        else:
            rows = [_logged(entry) for entry in audit.entries]
            session.out.table(("WHEN (UTC)", "WHO", "WHAT", "RESULT"), rows, fold=3)
        return
    found = history_report(context, pick_stack(context, stack, past=True))
    if session.out.json:
        session.out.data(found)
    elif not found.generations:
        session.out.note(f"{found.stack} has no generations on record")
    else:
        head = ("N", "WHEN (UTC)", "HOW", "STATE", "READY", "HEALTH", "WHAT")
        session.out.table(head, [_row(entry) for entry in found.generations], fold=6)


def model_name(source: str) -> str:
    """Return the short name of a model's source: m for file:/srv/models/m.gguf."""
    return source.rpartition(":")[2].rpartition("/")[2].removesuffix(".gguf")


def _row(entry: HistoryEntry) -> tuple[str, ...]:
    from stackctl.quantity import format_duration

    how = f"back to {entry.of}" if entry.of is not None else entry.operation
    if entry.state == "unreadable":
        what = entry.message or ""
    else:
        profile, objective = entry.profile or "", entry.objective or ""
        # The name of a profile such as cpu-latency has the objective already.
        parts = (profile, "" if profile.endswith(objective) else objective)
        what = " · ".join(part for part in (*parts, model_name(entry.model or "")) if part)
    status = entry.health.status if entry.health else None
    return (
        f"{entry.number}{' *' if entry.current else ''}",
        _minute(entry.created),
        how or "-",
        entry.state,
        "-" if entry.ready_s is None else format_duration(entry.ready_s),
        "FAIL" if status == "fail" else status or "-",
        what,
    )


def _logged(entry: AuditEntry) -> tuple[str, ...]:
    number = "" if entry.generation is None else f" ({entry.generation})"
    result = entry.result + (f": {entry.message}" if entry.message else "")
    return _minute(entry.when), entry.user, f"{entry.operation} {entry.stack}{number}", result


def _minute(when: str | None) -> str:
    """Return 2026-11-21T12:00:05Z as 11-21 12:00, or the date alone if it is another year's."""
    from stackctl.state.generations import utc_now

    if when is None:
        return "-"
    return when[5:16].replace("T", " ") if when[:4] == utc_now()[:4] else when[:10]


@stackctl_command("diff")
@click.argument("words", metavar="[STACK] [A] [B]", nargs=-1)
def diff(session: Session, words: tuple[str, ...]) -> None:
    """Show the differences between generations A and B of STACK.

    B defaults to the installed generation, and A to the one that served before it. Decisions come
    with the reason of B, units as a unified diff without the numbers of the generations.
    """
    from stackctl.observe.history import diff_report

    context = session.context(recover="try")
    stack, numbers = stack_and_numbers(words, 2)
    before, after, *_ = (*numbers, None, None)
    found = diff_report(context, pick_stack(context, stack, past=True), before, after)
    if not session.out.wrote_json(found):
        _show_difference(session, found)


def _show_difference(session: Session, found: DiffReport) -> None:
    out = session.out
    out.line(f"{found.stack}: generation {found.before} -> {found.after}")
    if not (found.facts or found.decisions or found.units):
        out.line("nothing differs")
        return
    number_a, number_b = str(found.before), str(found.after)
    if found.facts:
        out.line()
        rows = [(c.field, value_text(c.before), value_text(c.after)) for c in found.facts]
        out.table(("WHAT", number_a, number_b), rows, fold=2)
    if found.decisions:
        out.line()
        out.table(("FIELD", number_a, number_b, "WHY"), change_rows(found.decisions), fold=3)
    for unit in found.units:
        out.line()
        for line in unit.diff.removesuffix("\n").split("\n"):
            out.line(out.diff_line(line))


@stackctl_command("prune")
@stack_argument
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=10,
    metavar="N",
    help="Number of newest generations to keep (10).",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, change nothing.")
@yes_option
def prune(session: Session, stack: str | None, keep: int, dry_run: bool) -> None:
    """Remove old generations of STACK: their plans and units, not images, models or logs.

    The installed generation and the target of a rollback always stay. Compile caches of images
    that no generation of any stack uses are removed too. The command asks first, because nothing
    of it can be restored.
    """
    from stackctl.deploy import prune as pruning

    context = session.context()
    name = pick_stack(context, stack, past=True)
    found = pruning.prune(context, name, keep=keep, dry_run=dry_run)
    if session.out.wrote_json(found):
        return
    kept = ", ".join(map(str, found.kept)) or "none"
    done = "would remove" if dry_run else "removed"
    if not found.removed:
        session.out.line(f"{found.stack}: nothing to remove, kept {kept}")
    else:
        removed = ", ".join(map(str, found.removed))
        session.out.line(f"{found.stack}: {done} {removed}; {'keep' if dry_run else 'kept'} {kept}")
    if found.caches:
        session.out.line(f"{done} {pruning.compile_caches_text(found)}")


@stackctl_command("report")
@stack_argument
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help='Where to write it; default: stackctl-STACK.html here; "-": standard output.',
)
def report(session: Session, stack: str | None, output: str | None) -> None:
    """Write one page about STACK: its machine, plan, predictions and measurements.

    The page is a single HTML file that needs no network. Measure first: stackctl bench STACK.
    """
    from stackctl.deploy.stack_state import latest_generation
    from stackctl.observe.report.page import report_html, write_page
    from stackctl.values.result import ReportFile

    context = session.context(recover="try")
    name = pick_stack(context, stack, past=True)
    text = report_html(context, latest_generation(context, name))
    if output == "-" and not session.out.json:
        session.out.line(text.rstrip("\n"))
        return
    path = Path(output if output not in (None, "-") else f"stackctl-{name}.html").absolute()
    write_page(path, text)
    if not session.out.wrote_json(ReportFile(stack=name, path=str(path))):
        session.out.line(str(path))
