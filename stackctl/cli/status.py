"""``stackctl status``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, pick_stack, stack_argument, verb
from stackctl.errors import ExitCode
from stackctl.values.result import StackStatus


@verb("status")
@stack_argument
def command(session: Session, stack: str | None) -> None:
    """Show what runs: every stack, or STACK in detail.

    Exits 1 when a stack is not well, 3 when the named one is not up.
    """
    from stackctl.deploy import install
    from stackctl.deploy.transaction import not_running
    from stackctl.observe.status import report

    context = session.context()
    if stack is not None:
        stack = pick_stack(context, stack)
        if not install.installed(context, stack):
            raise not_running(stack)
    found = report(context, (stack,) if stack else install.installed_stacks(context))
    if session.out.json:
        session.out.data(found)
    elif not found.stacks:
        session.out.note(f"no {session.scope} stack is up: stackctl up PROFILE starts one")
    else:
        for status in found.stacks:
            _show(session, status)
    if any(status.state != "ready" for status in found.stacks):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


def _show(session: Session, status: StackStatus) -> None:
    out = session.out
    color = {"ready": "green", "starting": "yellow"}.get(status.state, "red")
    since = f" since {status.since}" if status.since else ""
    out.line(f"{status.stack}   {out.style(status.state, color)}{since}")
    parts = (status.profile, status.objective, status.engine)
    rows = [
        ("profile", " · ".join(part for part in parts if part)),
        ("model", status.model),
        ("endpoint", f"{status.endpoint}/v1" if status.endpoint else None),
        ("unit", f"{status.unit} ({status.unit_state or 'unknown'})"),
        ("restarts", str(status.restarts) if status.restarts else None),
        ("generation", str(status.generation) if status.generation is not None else None),
        ("image", status.image),
    ]
    for name, text in rows:
        if text:
            out.line(f"  {name:<12}{text}")
