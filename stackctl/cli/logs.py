"""``stackctl logs``."""

from __future__ import annotations

import select

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command


@stackctl_command("logs")
@stack_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option("--generation", type=int, metavar="N", help="Show generation N, not the latest.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=100,
    metavar="N",
    help="Lines to begin with (100).",
)
def command(
    session: Session,
    stack: str | None,
    follow: bool,
    generation: int | None,
    lines: int,
) -> None:
    """Show the log of STACK: its engine, its front door, and systemd's messages about them.

    If the stack is down or never came up, the log is of its latest generation. --generation shows
    the engine's output alone.
    """
    from stackctl.deploy.stack_state import installed_number
    from stackctl.machine import runner
    from stackctl.units.proxy_unit import proxy_log_identifier, proxy_service
    from stackctl.units.render import engine_unit_names, log_identifier, service_name

    context = session.context(recover="try")
    name = pick_stack(context, stack, past=True)
    known = context.generations.numbers(name)
    identifiers: tuple[str, ...] = ()
    if generation is None:
        identifiers = (proxy_log_identifier(name), "systemd")
        generation = installed_number(context, name) or max(known, default=0)
    elif generation not in known:
        context.generations.read(name, generation)  # raises and lists the generations
    status = runner.stream(
        context.systemd.journal_command(
            (*(service_name(unit) for unit in engine_unit_names(name)), proxy_service(name)),
            (log_identifier(name, generation), *identifiers),
            lines=lines,
            follow=follow,
            output="json" if session.out.json else "short-iso",
        )
    )
    if status != 0 and not _reader_is_gone():
        raise click.exceptions.Exit(1)


def _reader_is_gone() -> bool:
    """Return True if stdout is a pipe whose reader has ended (| head), which is not an error."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
