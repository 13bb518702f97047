"""``stackctl recover``."""

from __future__ import annotations

from stackctl.cli.session import Session, verb


@verb("recover")
def command(session: Session) -> None:
    """End a change that a crash, a kill or a power loss cut off.

    Every command that works with stacks does this first; afterwards either the old or the new
    generation serves.
    """
    from stackctl.deploy.recover import recover

    done = recover(session.context(recover=False))
    if done is None:
        session.out.line("nothing to recover")
        return
    number = done.after if done.committed else done.before
    state = f"generation {number}" if number is not None else "down"
    session.out.line(f"{done.stack} is recovered: {state}")
