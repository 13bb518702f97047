"""``stackctl metrics``."""

from __future__ import annotations

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError


@stackctl_command("metrics")
@stack_argument
@click.option("--all", "every", is_flag=True, help="Print every stack; succeed if none is up.")
def command(session: Session, stack: str | None, every: bool) -> None:
    """Print metrics that the engine of STACK lacks, in Prometheus' text format.

    They are the state, generation, restarts and last check, and estimates of KV use and latencies
    for engines that report none. The engines' own metrics are at their /metrics. To let
    node_exporter collect them, run in the folder of its textfile collector:

    \b
      stackctl metrics --all >stackctl.tmp && mv stackctl.tmp stackctl.prom
    """
    from stackctl.deploy import unit_files
    from stackctl.deploy.stack_state import not_running
    from stackctl.observe.metrics import collect_metrics, metrics_text

    if every and stack is not None:
        raise StackctlError("--all and STACK exclude each other", exit_code=ExitCode.USAGE)
    context = session.context(recover="try")
    names = unit_files.installed_stacks(context)
    if not every:
        name = pick_stack(context, stack)
        if name not in names:
            raise not_running(name)
        names = (name,)
    report = collect_metrics(context, names)
    if not session.out.wrote_json(report):
        session.out.text(metrics_text(report))
