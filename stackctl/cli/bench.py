"""``stackctl bench``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from stackctl.cli import bench_view
from stackctl.cli.options import current_slo, duration_option, pick_stack, stack_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.observe.bench.run import Bench, BenchEndpoint
    from stackctl.state.bench_db import BenchDatabase
    from stackctl.values.generation import Generation
    from stackctl.values.profile import Slo

    Target = tuple[Generation, Slo | None, BenchEndpoint]


class _Default(click.Group):
    """Group that runs ``bench run`` unless the first word is a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with click.Context(run, info_name="run", parent=ctx) as inner:
            run.format_options(inner, formatter)
        self.format_commands(ctx, formatter)


@click.group("bench", cls=_Default, subcommand_metavar="[STACK] | COMMAND [ARGS]...")
def command() -> None:
    """Measure a running stack as its clients see it.

    If the stack is named like a command below, use "stackctl bench run NAME". Exits 1 when
    requests fail or the profile's slo is missed, 3 when the stack does not run. Ctrl-C stores the
    results so far and exits 130. They are also stored when the engine ends meanwhile (exit 1).
    """


def _counts(_: object, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    from stackctl.quantity import parse_tokens

    if value is None:
        return None
    found = tuple(dict.fromkeys(parse_tokens(part) for part in value.split(",")))
    if min(found) < 1:
        name = option.opts[0]
        raise StackctlError(
            f"{name} {value}: must be at least 1", hint=f"{name} 1,2,4", exit_code=ExitCode.USAGE
        )
    return found


@stackctl_command("run")
@stack_argument
@click.option("--quick", is_flag=True, help="About a minute: short lengths, few requests.")
@click.option(
    "--prompt", "prompts", metavar="TOKENS,...", callback=_counts,
    help="Lengths of prompts; default 1024,4096,8192 and the slo's, as the context allows.",
)  # fmt: skip
@click.option(
    "--output", "outputs", metavar="TOKENS,...", callback=_counts,
    help="Lengths of answers; default 200,400,800.",
)  # fmt: skip
@click.option(
    "--concurrency", metavar="N,...", callback=_counts,
    help="Requests at the same time; default 1, 2, 4 ... up to the plan's.",
)  # fmt: skip
@click.option(
    "--requests", metavar="N", type=click.IntRange(1, 10_000),
    help="Requests in each cell; default 5.",
)  # fmt: skip
@click.option(
    "--prefix", type=click.Choice(["both", "uncached", "cached"]), default="both",
    help="Prompts that no cache holds, prompts that share a prefix, or both; default: both.",
)  # fmt: skip
@click.option(
    "--with", "tool", type=click.Choice(["aiperf"]),
    help="Send the requests with aiperf, for heavy load (a separate program).",
)  # fmt: skip
@click.option("--aiperf", metavar="PATH", help="Path of aiperf; default: the one on PATH.")
@click.option(
    "--from-here", is_flag=True,
    help="With --host: measure from this machine, ssh included, and store the results here.",
)  # fmt: skip
@duration_option("--timeout", "How long one request may take; default 10m.")
def run(
    session: Session,
    stack: str | None,
    tool: str | None,
    aiperf: str | None,
    from_here: bool,
    timeout: float | None,
    **matrix: Any,
) -> None:
    """Measure STACK: time to first token, tokens per second, time of whole answers.

    Each combination of lengths and concurrency is a cell of the result.
    """
    from stackctl.observe.bench.matrix import BenchOptions
    from stackctl.observe.bench.run import Bench

    if aiperf is not None and tool is None:
        raise StackctlError(
            "--aiperf needs --with aiperf",
            hint="stackctl bench --with aiperf --aiperf PATH",
            exit_code=ExitCode.USAGE,
        )
    if tool is not None:
        from stackctl.observe.bench.aiperf import find_aiperf

        aiperf = find_aiperf(aiperf)
    find = _remote_target if from_here else _local_target
    with find(session, stack) as (generation, slo, site):
        bench = Bench(
            session.out, generation, BenchOptions(**matrix),
            site=site, slo=slo, timeout_s=timeout or 600, aiperf=aiperf,
        )  # fmt: skip
        _measure(session, generation, bench)


@contextlib.contextmanager
def _local_target(session: Session, stack: str | None) -> Iterator[Target]:
    """Yield a running stack of this machine, its SLO and its site."""
    from stackctl.observe.bench import run

    context, generation = _running(session, stack)
    yield generation, current_slo(session, generation), run.local_endpoint(context, generation)


@contextlib.contextmanager
def _remote_target(session: Session, stack: str | None) -> Iterator[Target]:
    """Yield a running stack of a box, its SLO, and its site behind forwarded local ports.

    Raises:
        StackctlError: as the box's own ``bench``; exit 1 when the connection breaks.
    """
    from stackctl.cli import remote
    from stackctl.health import endpoint
    from stackctl.observe.bench.run import BenchEndpoint
    from stackctl.values.base import from_json
    from stackctl.values.bench import BenchTarget
    from stackctl.values.history import KeyReport

    host = session.host
    if host is None:
        raise StackctlError(
            "--from-here needs --host",
            hint="stackctl --host USER@BOX bench --from-here",
            exit_code=ExitCode.USAGE,
        )

    def ask(*words: str) -> bytes:
        return remote.fetch_json(host, (*words, *session.host_scope, "--json"))

    def look(stack: str | None) -> BenchTarget:
        words = ("bench", "target", *((stack,) if stack else ()))
        return from_json(ask(*words), BenchTarget, where=host)

    def current() -> int | None:
        try:
            return look(generation.stack).generation.number
        except StackctlError as error:
            if error.exit_code == ExitCode.NOT_RUNNING:
                return None
            # The connection broke. The bench ends, and its results so far are stored.
            session.out.warn(f"cannot check that it is still the same stack: {error.message}")
            return generation.number

    found = look(stack)
    generation, address = found.generation, urlsplit(found.url)
    key = None
    if generation.door is not None and generation.door.key:
        text = ask("key", "show", generation.stack)
        key = from_json(text, KeyReport, where=host).key
    there = remote.remote_host(host)
    with (
        there.forward_port(address.hostname or "127.0.0.1", address.port or 80) as clients,
        there.forward_port("127.0.0.1", generation.plan.engine_listen_port) as engine,
    ):
        _check_tunnel(generation, engine, host)
        session.out.step("bench", f"{generation.stack} of {host}, from here over ssh")
        site = BenchEndpoint(
            url=endpoint.base_url(clients),
            engine_url=endpoint.base_url(engine),
            key=key,
            current=current,
            box=host,
            command=remote.remote_command(host),
        )
        yield generation, found.slo, site


def _check_tunnel(generation: Generation, engine_port: int, host: str) -> None:
    """Raise if the engine does not answer on its forwarded port.

    The box has just reported that the engine is ready, so a failure here is the tunnel's.
    """
    from stackctl.cli import remote
    from stackctl.engines import engine
    from stackctl.health import endpoint

    if endpoint.liveness(engine_port, engine(generation.plan.engine).health_path) != "ready":
        raise StackctlError(
            f"no port of {host} can be reached through ssh",
            hint="its sshd must allow it (AllowTcpForwarding), or measure there: "
            f"{remote.remote_command(host)} bench",
        )


def _running(session: Session, stack: str | None) -> tuple[Context, Generation]:
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.bench import run

    context = session.context(recover="try")
    try:
        name = pick_stack(context, stack)
    except StackctlError as error:
        if error.exit_code == ExitCode.NOT_FOUND and stack in command.commands:
            error.hint = f"a command comes first: stackctl bench {stack}"
        raise
    generation = installed_generation(context, name)
    run.require_running(context, generation)
    return context, generation


def _measure(session: Session, generation: Generation, bench: Bench) -> None:
    import msgspec

    from stackctl.machine import lock
    from stackctl.machine.signals import ignore_signals
    from stackctl.state.bench_db import BenchDatabase

    paths = session.paths()
    benches = BenchDatabase(paths.state)
    benches.prepare()
    # Two benches at once would slow each other down.
    with lock.exclusive(paths.runtime / "bench.lock", f"bench {generation.stack}"):
        interrupted = bench.measure()
    failed = None
    with ignore_signals():  # another Ctrl-C must not lose the results
        report, samples = bench.result(interrupted=interrupted)
        try:
            number = benches.add(report, samples, generation.plan, generation.host)
            report = msgspec.structs.replace(report, id=number)
        except StackctlError as error:
            failed = error
        if not session.out.wrote_json(report):
            bench_view.show_run(session.out, report)
    if failed is not None:
        if session.out.json:
            session.out.warn(f"not stored: {failed.message}", failed.hint)
            raise click.exceptions.Exit(int(ExitCode.FAILED))
        failed.message = f"not stored: {failed.message}"
        raise failed
    if interrupted:
        session.out.note(f"interrupted: the results so far are bench {report.id}")
        raise click.exceptions.Exit(int(ExitCode.INTERRUPTED))
    if not report.complete or any(result.status == "fail" for result in report.results):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


@stackctl_command("target")
@stack_argument
def target(session: Session, stack: str | None) -> None:
    """Print the data about a running STACK that --from-here needs, as JSON."""
    from stackctl.observe.status import stack_url
    from stackctl.values.bench import BenchTarget

    _, generation = _running(session, stack)
    session.out.data(
        BenchTarget(
            generation=generation, url=stack_url(generation), slo=current_slo(session, generation)
        )
    )


# Only the stackctl of another machine runs it.
target.hidden = True


@stackctl_command("list")
@stack_argument
def list_runs(session: Session, stack: str | None) -> None:
    """List the stored runs, of STACK or of all, newest first."""
    from stackctl.values.bench import BenchList

    runs = _benches(session).runs(stack)
    if stack is not None and not runs:
        pick_stack(session.context(recover="no"), stack)  # raises if the stack does not exist
    if session.out.json:
        session.out.data(BenchList(runs=runs))
    elif runs:
        bench_view.show_runs(session.out, runs)
    else:
        words = "stackctl bench --quick" if stack is None else f"stackctl bench {stack} --quick"
        session.out.note(f"nothing was measured yet: {words}")


@stackctl_command("show")
@click.argument("number", metavar="ID", type=click.IntRange(1))
def show(session: Session, number: int) -> None:
    """Show the stored run ID."""
    report = _benches(session).read(number)
    if not session.out.wrote_json(report):
        bench_view.show_run(session.out, report)


@stackctl_command("compare")
@click.argument("before", metavar="A", type=click.IntRange(1))
@click.argument("after", metavar="B", type=click.IntRange(1))
def compare(session: Session, before: int, after: int) -> None:
    """Compare run B with run A, cell by cell.

    A difference counts if it is at least 2 % and its 95 % interval does not include 0.
    """
    from stackctl.observe.bench.compare import compare_runs

    found = compare_runs(_benches(session), before, after)
    if not session.out.wrote_json(found):
        bench_view.show_comparison(session.out, found)


def _benches(session: Session) -> BenchDatabase:
    from stackctl.state.bench_db import BenchDatabase

    return BenchDatabase(session.context(recover="no").paths.state)


for _command in (run, target, list_runs, show, compare):
    command.add_command(_command)
