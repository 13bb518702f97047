"""``stackctl check``."""

from __future__ import annotations

import click

from stackctl.cli.options import current_slo, duration_option, pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.result import CheckReport, ChecksReport


@stackctl_command("check")
@stack_argument
@click.option("--all", "every", is_flag=True, help="Check every stack.")
@click.option("--slo", is_flag=True, help="Judge by the profile's slo too: see stackctl bench.")
@duration_option("--timeout", "How long the answer may take; default 2m.")
def command(
    session: Session, stack: str | None, every: bool, slo: bool, timeout: float | None
) -> None:
    """Check STACK: its unit, its endpoint, the model it lists, and one real completion.

    The result is stored in the stack's history. Exits 1 when anything is wrong, 3 when the stack
    is stopped. --slo also compares the last bench of the running generation, and the engine's own
    metrics (latencies, prefix-cache hits), with the profile's slo.
    """
    from stackctl.deploy import unit_files
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.check import check_stack, health_entry, record_health

    if every and stack is not None:
        raise StackctlError("--all and STACK exclude each other", exit_code=ExitCode.USAGE)
    context = session.context(recover="try")
    names = unit_files.installed_stacks(context) if every else ()
    reports = []
    for name in names or (pick_stack(context, stack),):
        generation = installed_generation(context, name)
        report = check_stack(context, generation, answer_timeout_s=timeout or 120)
        record_health(context, name, health_entry(generation, report))
        if slo and _exit_code(report) == ExitCode.OK:
            from stackctl.observe.bench.slo import slo_status

            found = slo_status(context, generation, current_slo(session, generation))
            report = CheckReport(stack=name, results=(*report.results, *found))
        reports.append(report)
        if not session.out.json:
            if every:
                session.out.line(name)
            session.out.results(report.results)
    if session.out.json:
        checks = ChecksReport(scope=session.scope, stacks=tuple(reports))
        session.out.data(checks if every else reports[0])
    code = max((_exit_code(report) for report in reports), default=ExitCode.OK)
    if code != ExitCode.OK:
        raise click.exceptions.Exit(int(ExitCode.FAILED if len(reports) > 1 else code))


def _exit_code(report: CheckReport) -> ExitCode:
    failed = [result for result in report.results if result.status == "fail"]
    if not failed:
        return ExitCode.OK
    stopped = failed[0].name == "unit" and failed[0].actual == "inactive"
    return ExitCode.NOT_RUNNING if stopped else ExitCode.FAILED
