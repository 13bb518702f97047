"""``stackctl status``."""

from __future__ import annotations

import datetime

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode
from stackctl.values.history import HealthEntry
from stackctl.values.status import StackStatus

_COLUMN = 14


@stackctl_command("status")
@stack_argument
def command(session: Session, stack: str | None) -> None:
    """Show STACK, or every stack that is up.

    Changes by hand since the deployment are listed too. Exits 1 when a stack is not ready, 3 when
    STACK is not up.
    """
    from stackctl.deploy import unit_files
    from stackctl.deploy.stack_state import not_running
    from stackctl.observe.status import status_report

    context = session.context(recover="try")
    if stack is not None:
        stack = pick_stack(context, stack)
        if stack not in unit_files.installed_stacks(context):
            raise not_running(stack)
    found = status_report(context, (stack,) if stack else unit_files.installed_stacks(context))
    if session.out.json:
        session.out.data(found)
    elif not found.stacks:
        session.out.note(f"no {session.scope} stack is up: stackctl up PROFILE starts one")
    else:
        for status in found.stacks:
            _show(session, status)
        session.out.line(
            "guard: every minute" if found.guard else "guard: off (stackctl guard --install)"
        )
    if any(status.state != "ready" for status in found.stacks):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


def _show(session: Session, status: StackStatus) -> None:
    out = session.out
    color = {"ready": "green", "starting": "yellow"}.get(status.state, "red")
    since = f" since {status.since}" if status.since else ""
    out.line(f"{status.stack}   {out.style(status.state, color)}{since}")
    parts = (status.profile, status.objective, status.engine)
    rows = [
        ("why", status.cause),
        ("fix", status.remedy),
        *(("changed", text) for text in status.drift),
        ("profile", " · ".join(part for part in parts if part)),
        ("model", status.model),
        ("endpoint", f"{status.endpoint}/v1" if status.endpoint else None),
        ("unit", f"{status.unit} ({status.unit_state or 'unknown'})"),
        ("container", _container(status)),
        ("door", f"{status.door} ({status.door_state or 'unknown'})" if status.door else None),
        ("restarts", str(status.restarts) if status.restarts else None),
        ("generation", str(status.generation) if status.generation is not None else None),
        ("checked", _checked(status.health) if status.health else None),
        ("image", status.image),
    ]
    for name, text in rows:
        if text:
            out.labelled(name, text, indent=2, column=_COLUMN)


def _container(status: StackStatus) -> str | None:
    if status.container is None:
        return None
    states = (status.container_state or "absent", status.container_health)
    return f"{status.container} ({', '.join(state for state in states if state)})"


def _checked(health: HealthEntry) -> str:
    word = "FAIL" if health.status == "fail" else health.status
    parts = (health.name, health.message)
    what = ": ".join(part for part in parts if part)
    return f"{word} {_ago(health.when)}" + (f", {what}" if what else "")


def _ago(when: str) -> str:
    try:
        passed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(when)
    except (ValueError, TypeError):
        return when
    seconds = max(0, int(passed.total_seconds()))
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if count := seconds // size:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
