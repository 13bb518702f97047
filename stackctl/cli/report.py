"""``stackctl report``."""

from __future__ import annotations

from pathlib import Path

import click

from stackctl.cli.options import pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command


@stackctl_command("report")
@stack_argument
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help='Where to write it; default: stackctl-STACK.html here; "-": standard output.',
)
def command(session: Session, stack: str | None, output: str | None) -> None:
    """Write one page about STACK: its machine, plan, predictions and measurements.

    The page is a single HTML file that needs no network. Measure first: stackctl bench STACK.
    """
    from stackctl.deploy.stack_state import latest_generation
    from stackctl.observe.report.page import report_html, write_page
    from stackctl.values.result import ReportFile

    context = session.context(recover="try")
    name = pick_stack(context, stack, past=True)
    text = report_html(context, latest_generation(context, name))
    if output == "-" and not session.out.json:
        session.out.line(text.rstrip("\n"))
        return
    path = Path(output if output not in (None, "-") else f"stackctl-{name}.html").absolute()
    write_page(path, text)
    if not session.out.wrote_json(ReportFile(stack=name, path=str(path))):
        session.out.line(str(path))
