"""The commands that watch stacks: status, check, verify, guard, metrics, logs."""

from __future__ import annotations

import datetime
import select

import click

from stackctl.cli.options import (
    current_slo,
    duration_option,
    pick_stack,
    running_stack,
    stack_argument,
)
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.history import GuardResult, HealthEntry, StackStatus
from stackctl.values.result import CheckReport, ChecksReport

_COLUMN = 14


@stackctl_command("status")
@stack_argument
def status(session: Session, stack: str | None) -> None:
    """Show STACK, or every stack that is up.

    Changes by hand since the deployment are listed too. Exits 1 when a stack is not ready, 3 when
    STACK is not up.
    """
    from stackctl.deploy import unit_files
    from stackctl.observe.status import status_report

    context = session.context(recover="try")
    names = unit_files.installed_stacks(context)
    found = status_report(context, names if stack is None else (running_stack(context, stack),))
    if session.out.json:
        session.out.data(found)
    elif not found.stacks:
        session.out.note(f"no {session.scope} stack is up: stackctl up PROFILE starts one")
    else:
        for one in found.stacks:
            _show_status(session, one)
        session.out.line(
            "guard: every minute" if found.guard else "guard: off (stackctl guard --install)"
        )
    if any(one.state != "ready" for one in found.stacks):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


def _show_status(session: Session, status: StackStatus) -> None:
    out = session.out
    color = {"ready": "green", "starting": "yellow"}.get(status.state, "red")
    since = f" since {status.since}" if status.since else ""
    out.line(f"{status.stack}   {out.style(status.state, color)}{since}")
    parts = (status.profile, status.objective, status.engine)
    rows = [
        ("why", status.cause),
        ("fix", status.remedy),
        *(("changed", text) for text in status.drift),
        ("profile", " · ".join(part for part in parts if part)),
        ("model", status.model),
        ("endpoint", f"{status.endpoint}/v1" if status.endpoint else None),
        ("unit", f"{status.unit} ({status.unit_state or 'unknown'})"),
        ("container", _container(status)),
        ("door", f"{status.door} ({status.door_state or 'unknown'})" if status.door else None),
        ("restarts", str(status.restarts) if status.restarts else None),
        ("generation", str(status.generation) if status.generation is not None else None),
        ("checked", _checked(status.health) if status.health else None),
        ("image", status.image),
    ]
    for name, text in rows:
        if text:
            out.labelled(name, text, indent=2, column=_COLUMN)


def _container(status: StackStatus) -> str | None:
    if status.container is None:
        return None
    states = (status.container_state or "absent", status.container_health)
    return f"{status.container} ({', '.join(state for state in states if state)})"


def _checked(health: HealthEntry) -> str:
    word = "FAIL" if health.status == "fail" else health.status
    parts = (health.name, health.message)
    what = ": ".join(part for part in parts if part)
    return f"{word} {_ago(health.when)}" + (f", {what}" if what else "")


def _ago(when: str) -> str:
    try:
        passed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(when)
    except (ValueError, TypeError):
        return when
    seconds = max(0, int(passed.total_seconds()))
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if count := seconds // size:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


@stackctl_command("check")
@stack_argument
@click.option("--all", "every", is_flag=True, help="Check every stack.")
@click.option("--slo", is_flag=True, help="Judge by the profile's slo too: see stackctl bench.")
@duration_option("--timeout", "How long the answer may take; default 2m.")
def check(
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


@stackctl_command("verify")
@stack_argument
def verify(session: Session, stack: str | None) -> None:
    """Prove that STACK runs as planned, by data of kernel and engine, not of the unit.

    Mismatches come first, each with its cause and remedy. A property that cannot be read is
    skipped, never reported as ok. The engine answers a few short requests meanwhile. Exits 1 when
    anything is not as planned, 3 when the stack does not run.
    """
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.inspection import verify_stack

    context = session.context(recover="try")
    generation = installed_generation(context, pick_stack(context, stack))
    report = verify_stack(context, generation)
    if not session.out.wrote_json(report):
        session.out.results(report.results)
    if any(result.status == "fail" for result in report.results):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


@stackctl_command("guard")
@duration_option("--timeout", "How long each answer may take; default 30s.")
@click.option("--install", is_flag=True, help="Install a timer that does this every minute.")
@click.option("--remove", is_flag=True, help="Remove the timer.")
def guard(session: Session, timeout: float | None, install: bool, remove: bool) -> None:
    """Check all stacks once, record the results, and restart dead engines.

    Prints nothing when all is well, exits 1 when a stack is not. An engine is dead if in two checks
    in a row it neither answers nor works. Engines that answer late because they are busy, and
    stacks that are starting or being changed, are left alone.
    """
    from stackctl.deploy import guard_timer
    from stackctl.machine import runner
    from stackctl.observe.check import guard_stacks

    context = session.context(recover="try")
    if install and remove:
        raise StackctlError("--install or --remove, not both", exit_code=ExitCode.USAGE)
    if install:
        for path in guard_timer.install_timer(context, runner.own_command()):
            session.out.note(f"unit      {path}")
        session.out.line("guarding all stacks, every minute")
        return
    if remove:
        gone = guard_timer.remove_timer(context)
        session.out.line("guarding no more" if gone else "there was no guard")
        return
    report = guard_stacks(context, answer_timeout_s=timeout or 30)
    wrong = [seen for seen in report.stacks if seen.health and seen.health.status == "fail"]
    if not session.out.wrote_json(report):
        for seen in wrong:
            session.out.line(_guard_text(seen))
    if wrong:
        raise click.exceptions.Exit(int(ExitCode.FAILED))


def _guard_text(seen: GuardResult) -> str:
    health = seen.health
    assert health is not None
    words = f"{seen.stack}   FAIL  {health.name}: {health.message or 'nothing to see'}"
    return f"{words}; restarted" if seen.action == "restarted" else words


@stackctl_command("metrics")
@stack_argument
@click.option("--all", "every", is_flag=True, help="Print every stack; succeed if none is up.")
def metrics(session: Session, stack: str | None, every: bool) -> None:
    """Print metrics that the engine of STACK lacks, in Prometheus' text format.

    They are the state, generation, restarts and last check, and estimates of KV use and latencies
    for engines that report none. The engines' own metrics are at their /metrics. To let
    node_exporter collect them, run in the folder of its textfile collector:

    \b
      stackctl metrics --all >stackctl.tmp && mv stackctl.tmp stackctl.prom
    """
    from stackctl.deploy import unit_files
    from stackctl.observe.metrics import collect_metrics, metrics_text

    if every and stack is not None:
        raise StackctlError("--all and STACK exclude each other", exit_code=ExitCode.USAGE)
    context = session.context(recover="try")
    names = unit_files.installed_stacks(context) if every else (running_stack(context, stack),)
    report = collect_metrics(context, names)
    if not session.out.wrote_json(report):
        session.out.text(metrics_text(report))


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
def logs(
    session: Session, stack: str | None, follow: bool, generation: int | None, lines: int
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
