"""``stackctl restart``."""

from __future__ import annotations

from stackctl.cli.options import drain_option, rollout_timeouts
from stackctl.cli.session import Session, stackctl_command
from stackctl.cli.stack_argument import pick_stack, stack_argument


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
    generation = restart(context, pick_stack(context, stack), rollout_timeouts(drain, None))
    if session.out.json:
        session.out.data(stack_report(context, generation.stack))
        return
    session.out.line(f"{generation.stack} is up (generation {generation.number}, restarted)")
