"""``stackctl recover``."""

from __future__ import annotations

from stackctl.cli.session import Session, stackctl_command


@stackctl_command("recover")
def command(session: Session) -> None:
    """Complete or revert a change that a crash, a kill or a power loss interrupted.

    Afterwards either the old or the new generation serves. Most commands that work with stacks do
    this first. --json prints the status of the stacks that are up.
    """
    from stackctl.deploy.transaction import recover
    from stackctl.deploy.unit_files import installed_stacks
    from stackctl.observe.status import status_report

    context = session.context(recover="no")
    done = recover(context)
    if session.out.json:
        session.out.data(status_report(context, installed_stacks(context)))
        return
    if done is None:
        session.out.line("nothing to recover")
        return
    state = f"generation {done.winner}" if done.winner is not None else "down"
    session.out.line(f"{done.stack} is recovered: {state}")
