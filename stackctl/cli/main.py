"""The command group, which imports verbs on use and turns errors into exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from stackctl import __version__
from stackctl.cli.output import Output
from stackctl.cli.session import Session, global_options, stackctl_command
from stackctl.errors import ExitCode, StackctlError, did_you_mean

#: Verbs by purpose, with their line in --help.
HEADINGS = {
    "Set up": {
        "probe": "Show this machine: CPUs, memory, GPUs, tools, and problems.",
        "doctor": "Find the obstacles to a profile, and commands that fix them.",
        "provision": "Make this machine ready for stacks, or undo that.",
        "image": "Build or load engine images without a registry.",
        "completion": "Print the completion script of a shell.",
    },
    "Run": {
        "profiles": "List profiles: which fit here, how fast, and their downloads.",
        "plan": "Show the plan for a profile on this machine, and why.",
        "render": "Write the units of a profile without installing them.",
        "up": "Plan, install, start and check a stack.",
        "switch": "Switch a stack to another objective or profile.",
        "restart": "Restart a stack and wait until it answers.",
        "rollback": "Go back to an earlier generation of a stack.",
        "recover": "Complete or revert an interrupted change.",
        "down": "Stop a stack and remove its units.",
        "key": "Create, show, change and remove the API key of a stack.",
        "client": "Print or write settings for clients, such as aider.",
    },
    "Watch": {
        "status": "Show the running stacks.",
        "check": "Check the health of a stack, with one real answer.",
        "verify": "Prove by kernel and engine that a stack runs as planned.",
        "diagnose": "Find why a stack is slow, and list remedies.",
        "top": "Watch speed, requests and load of stacks, live.",
        "logs": "Show the log of a stack.",
        "guard": "Check all stacks and restart dead engines, once or by a timer.",
        "metrics": "Print metrics that engines lack, for Prometheus.",
    },
    "Measure": {
        "bench": "Measure a running stack as its clients see it.",
        "calibrate": "Measure this machine, for better plans.",
        "report": "Write a page on a stack: machine, plan, measurements.",
    },
    "Models": {
        "model": "Show, fetch, check and remove models.",
    },
    "Housekeeping": {
        "history": "List the generations of a stack, or all changes with users.",
        "diff": "Show the differences between two generations of a stack.",
        "prune": "Remove old generations of a stack.",
    },
}
#: Modules with several verbs. Every other verb is ``command`` in a module of its own.
_SHARED = {
    "main": ("completion",),
    "probe": ("probe", "doctor"),
    "changes": ("up", "switch", "restart", "rollback", "recover", "down"),
    "plan": ("plan", "render", "calibrate"),
    "watch": ("status", "check", "verify", "guard", "metrics", "logs"),
    "history": ("history", "diff", "prune", "report"),
}
VERBS = tuple(verb for verbs in HEADINGS.values() for verb in verbs)
#: Hints for missing arguments, by the name of the argument; --help for all others.
_HINTS = {
    "profile": "a profile: stackctl profiles",
    "profile_name": "a profile: stackctl profiles",
    "to": "latency, throughput, or a profile: stackctl profiles",
}
_VERB_WIDTH = max(map(len, VERBS))


class _Group(click.Group):
    """Group that imports a verb only when it is used, so that each command starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = next((name for name, verbs in _SHARED.items() if cmd_name in verbs), None)
        found = importlib.import_module(f"stackctl.cli.{module or cmd_name}")
        command = getattr(found, cmd_name if module else "command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            raise StackctlError(
                f"there is no command {args[0]!r}",
                hint=did_you_mean(args[0], VERBS, "stackctl --help lists them"),
                exit_code=ExitCode.USAGE,
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for heading, verbs in HEADINGS.items():
            with formatter.section(heading):
                # One column for all headings.
                formatter.write_dl(
                    [(f"{verb:<{_VERB_WIDTH}}", text) for verb, text in verbs.items()]
                )


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    # The README has the same text; a test compares them.
    epilog="Exit codes: 0 done, 1 failed or unhealthy, 2 usage or invalid profile, 3 not running, "
    "4 no such profile or stack, 5 refused: does not fit or is not viable, "
    "6 the host lacks something, 7 another stackctl is at work, 130 interrupted.",
)
@global_options
@click.version_option(__version__, prog_name="stackctl", message="%(prog)s %(version)s")
def cli(**_: Any) -> None:
    """Serve language models on this machine: plan, launch, check and switch inference engines
    under Podman and systemd.

    First: stackctl probe, then stackctl up PROFILE (stackctl profiles lists them,
    and stackctl up alone names the best).
    """


@stackctl_command("completion")
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def completion(session: Session, shell: str) -> None:
    """Print the completion script of SHELL (bash, zsh, fish).

    bash: stackctl completion bash > ~/.local/share/bash-completion/completions/stackctl
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    session.out.line(kind(cli, {}, "stackctl", "_STACKCTL_COMPLETE").source().rstrip())


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; never raises, never shows a traceback."""
    _open_descriptors()
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has ended (| head), which is not an error.
        sys.stdout = None
        return int(ExitCode.OK)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            Output(json="--json" in arguments).error(_bug(error))
            return int(ExitCode.FAILED)
        sys.stdout = None
        sys.stderr.write(f"error: cannot write the output: {error.strerror}\n")
        return int(ExitCode.FAILED)
    return code


def _run(arguments: Sequence[str]) -> int:
    # Set by the stackctl of another machine: its version, and its name for this machine.
    caller, _, name = os.environ.get("STACKCTL_CALLER", "").partition(" ")
    _end_gracefully(hang_up=not caller)
    _print_anything()
    if os.environ.get("_STACKCTL_COMPLETE"):
        cli.main(args=list(arguments), prog_name="stackctl")
    out = Output(json="--json" in arguments)  # until the options are parsed
    if caller and caller != __version__ and "--version" not in arguments:
        out.warn(
            f"stackctl is {__version__} on {name}, and {caller} where it is called from",
            f"stackctl --host {name} provision, from the newer one",
        )
    try:
        if any(word.partition("=")[0] == "--host" for word in arguments):
            from stackctl.cli import remote

            if (code := remote.run(arguments, VERBS, out)) is not None:
                return code
        with cli.make_context("stackctl", list(arguments)) as context:
            try:
                cli.invoke(context)
            finally:
                out = context.meta.get("stackctl.output", out)
        return int(ExitCode.OK)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            click.echo(error.format_message(), err=True)
            return int(ExitCode.USAGE)
        out.error(_usage_error(error))
        return int(ExitCode.USAGE)
    except StackctlError as error:
        out.error(error)
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        # A second Ctrl-C must not interrupt the output of the error.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        out.error(StackctlError("interrupted", exit_code=ExitCode.INTERRUPTED))
        return int(ExitCode.INTERRUPTED)
    except OSError:
        raise
    except Exception as error:
        out.error(_bug(error))
        return int(ExitCode.FAILED)


def _usage_error(error: click.UsageError) -> StackctlError:
    """Return the error for a command line that click refuses."""
    where = error.ctx.command_path if error.ctx is not None else "stackctl"
    message = " ".join(error.format_message().split()).rstrip(".")
    hint = f"{where} --help"
    if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Argument):
        name = error.param.name or ""
        message = f"missing {error.param.metavar or name.upper()}"
        hint = _HINTS.get(name, hint)
    return StackctlError(message, hint=hint, exit_code=ExitCode.USAGE)


def _bug(error: Exception) -> StackctlError:
    """Return the error for an unexpected exception, with its place instead of a traceback."""
    places = traceback.extract_tb(error.__traceback__)[-3:]
    return StackctlError(
        f"stackctl has a bug: {type(error).__name__}: {error}",
        details=[f"{place.filename}:{place.lineno} in {place.name}" for place in places],
        hint="please report it with these lines; stackctl status shows what runs",
    )


def _print_anything() -> None:
    """Escape characters that the encoding of stdout or stderr lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_descriptors() -> None:
    """Open the closed ones of descriptors 0, 1 and 2, because a file would get their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _end_gracefully(*, hang_up: bool) -> None:
    """Make SIGTERM and SIGHUP end a transaction in order, as Ctrl-C does.

    Without ``hang_up`` ignore SIGHUP: an ssh connection may break during a change.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt if hang_up else signal.SIG_IGN)
