"""``stackctl restart``."""

from __future__ import annotations

from stackctl.cli.session import Session, pick_stack, stack_argument, verb


@verb("restart")
@stack_argument
def command(session: Session, stack: str | None) -> None:
    """Restart STACK as it is installed, and wait until it answers."""
    from stackctl.deploy.transaction import restart
    from stackctl.observe.status import one

    context = session.context()
    generation = restart(context, pick_stack(context, stack))
    if session.out.json:
        session.out.data(one(context, generation.stack))
        return
    session.out.line(f"{generation.stack} is up (generation {generation.number}, restarted)")
