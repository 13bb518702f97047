"""``stackctl logs``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, pick_stack, stack_argument, verb


@verb("logs")
@stack_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option("--generation", type=int, help="Only the engine's output in that generation.")
@click.option("-n", "--lines", default=100, show_default=True, help="Lines to begin with.")
def command(
    session: Session, stack: str | None, follow: bool, generation: int | None, lines: int
) -> None:
    """Show the log of STACK: the engine's output and what systemd says of it."""
    from stackctl.machine import runner
    from stackctl.units.render import log_identifier, service_name

    context = session.context()
    name = pick_stack(context, stack)
    identifier = None
    if generation is not None:
        context.generations.read(name, generation)
        identifier = log_identifier(name, generation)
    output = "json" if session.out.json else "short-iso" if identifier is None else "cat"
    status = runner.stream(
        context.systemd.journal_command(
            service_name(name), identifier, lines=lines, follow=follow, output=output
        )
    )
    if status != 0:
        raise click.exceptions.Exit(1)
