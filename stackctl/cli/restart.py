"""``stackctl restart``."""

from __future__ import annotations

from stackctl.cli.options import drain_option, pick_stack, rollout_timeouts, stack_argument
from stackctl.cli.session import Session, stackctl_command


@stackctl_command("restart")
@stack_argument
@drain_option
def command(session: Session, stack: str | None, drain: float | None) -> None:
    """Restart STACK as it is installed, and wait until it answers.

    With a front door, running requests end first, and new requests wait.
    """
    from stackctl.deploy.lifecycle import restart
    from stackctl.observe.status import stack_report

    context = session.context()
    generation = restart(context, pick_stack(context, stack), rollout_timeouts(drain))
    if session.out.json:
        session.out.data(stack_report(context, generation.stack))
        return
    session.out.line(f"{generation.stack} is up (generation {generation.number}, restarted)")
