"""``stackctl metrics``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, pick_stack, stack_argument, verb
from stackctl.errors import ExitCode, StackctlError


@verb("metrics")
@stack_argument
@click.option("--all", "every", is_flag=True, help="Of every stack, also when there is none.")
def command(session: Session, stack: str | None, every: bool) -> None:
    """Print what the engine of STACK does not tell, in Prometheus' text format.

    Its state, generation, restarts and last check; and estimates of KV use and latencies for
    engines that report none. What engines tell themselves is at their own /metrics. To have them
    collected, in the folder of node_exporter's textfile collector:

    \b
      stackctl metrics --all >stackctl.tmp && mv stackctl.tmp stackctl.prom
    """
    from stackctl.deploy import install
    from stackctl.deploy.stack_state import not_running
    from stackctl.observe.metrics import gather, text

    if every and stack is not None:
        raise StackctlError("--all and STACK exclude each other", exit_code=ExitCode.USAGE)
    context = session.context(recover="try")
    names = install.installed_stacks(context)
    if not every:
        name = pick_stack(context, stack)
        if name not in names:
            raise not_running(name)
        names = (name,)
    report = gather(context, names)
    if session.out.json:
        session.out.data(report)
    else:
        session.out.text(text(report))
