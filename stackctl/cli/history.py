"""``stackctl history``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.values.history import AuditEntry, HistoryEntry


@stackctl_command("history")
@stack_argument
@click.option("--log", is_flag=True, help="Show who changed what and how it went, oldest first.")
def command(session: Session, stack: str | None, log: bool) -> None:
    """List the generations of STACK, newest first; * marks the installed one.

    HEALTH is the result of the last check. The log of generation N: stackctl logs --generation N
    """
    from stackctl.observe import history

    context = session.context(recover="try")
    if log:
        audit = history.audit_report(context, stack)
        if session.out.json:
            session.out.data(audit)
        elif not audit.entries:
            session.out.note("nothing was changed yet")
        else:
            rows = [_logged(entry) for entry in audit.entries]
            session.out.table(("WHEN (UTC)", "WHO", "WHAT", "RESULT"), rows, fold=3)
        return
    found = history.history_report(context, pick_stack(context, stack, past=True))
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
