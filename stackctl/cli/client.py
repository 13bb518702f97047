"""``stackctl client``."""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from stackctl.cli.options import FOLDER, pick_stack, stack_argument, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.values.client import ClientReport, Tool

#: Lines of a settings file that may hold a key: "openai-api-key: VALUE", "- NAME=VALUE" in a list,
#: or a list on one line; also in quotes and in comments.
_KEY = re.compile(
    r"(?i)^(.[ \t#]*(?:(?:-[ \t]*)?['\"]?(?:[\w-]*key|set-env|authorization)['\"]?[ \t]*:"
    r"|-[ \t]*['\"]?[\w-]+=)[ \t]*)\S.*"
)
#: Largest size of a settings file.
_MOST_BYTES = 2**20


@click.group("client")
def command() -> None:
    """Print or write settings for clients: address, model, limits and speed."""


@stackctl_command("openai")
@stack_argument
def openai(session: Session, stack: str | None) -> None:
    """Print environment variables for programs with an OpenAI client.

    Use them with: eval "$(stackctl client openai)". The output has the command that prints the
    key, not the key.
    """
    report = _report(session, stack, "openai")
    if session.out.wrote_json(report):
        return
    for name, _, value in (text.partition("=") for text in report.environment):
        session.out.line(f"export {name}={shlex.quote(value)}")
    if report.key_command is not None:
        session.out.line(_key_export(report.key_command))
    limit = "" if report.context is None else f", {report.context:,} tokens a request"
    session.out.note(f"model {report.model}{limit}")


@stackctl_command("aider")
@stack_argument
@click.option(
    "--write", is_flag=True, help="Write them into the folder, after showing the changes."
)
@click.option("--folder", type=FOLDER, default=".", help="Where aider is started; default: here.")
@yes_option
def aider(session: Session, stack: str | None, write: bool, folder: Path) -> None:
    """Print settings for aider, or put them into its files with --write.

    They select diff edits, temperature 0, a small map of the repository, and the server's limits.
    Other settings in those files stay.
    """
    from stackctl.observe.client_settings import AIDER_CONFIG, merge_settings, shadows_api_key

    report = _report(session, stack, "aider")
    if not write:
        if not session.out.wrote_json(report):
            _print(session, report)
        return
    changed = []
    for file in report.files:
        path = _resolved(folder / file.name)
        present = _present(path)
        text = merge_settings(file, present)
        if file.name == AIDER_CONFIG and shadows_api_key(report, text):
            session.out.warn(
                f"{path} has an openai-api-key, which aider takes before the environment's",
                "remove that line: this stack wants a key of its own",
            )
        if text != present:
            changed.append((path, present, text))
    for path, present, text in changed:
        _show(session, path, present, text)
    files = "1 file" if len(changed) == 1 else f"{len(changed)} files"
    if not changed:
        session.out.note(f"nothing to change in {folder}")
    elif session.confirm(f"{files} would be written"):
        _write(changed)
        session.out.note(f"wrote {', '.join(path.name for path, _, _ in changed)}")
    else:
        raise StackctlError("nothing was changed")
    if session.out.json:
        session.out.data(report)
    elif report.key_command is not None:
        session.out.note("aider takes the key from its environment:")
        session.out.line(_key_export(report.key_command))


for _command in (aider, openai):
    command.add_command(_command)


def _report(session: Session, stack: str | None, tool: Tool) -> ClientReport:
    from stackctl.deploy.stack_state import installed_generation
    from stackctl.observe.client_settings import client_report, measured_speed, planned_speed
    from stackctl.observe.status import stack_url
    from stackctl.state.bench_db import BenchDatabase
    from stackctl.values.client import Speeds

    if session.host is not None:
        return _report_of(session, session.host, stack, tool)
    context = session.context(recover="try")
    generation = installed_generation(context, pick_stack(context, stack))
    run = BenchDatabase(context.paths.state).latest(generation.stack, generation.number)
    speeds = measured_speed(run) if run is not None else Speeds()
    if speeds.source is None:
        speeds = planned_speed(generation)
    return client_report(generation, stack_url(generation), speeds, tool)


def _report_of(session: Session, host: str, stack: str | None, tool: Tool) -> ClientReport:
    """Return the report of a stack on another machine, with the key's command for use here."""
    import msgspec

    from stackctl.cli import remote
    from stackctl.values.base import from_json
    from stackctl.values.client import ClientReport

    words = ["client", tool, *((stack,) if stack else ()), *session.host_scope, "--json"]
    report = from_json(remote.fetch_json(host, words), ClientReport, where=host)
    tunnel = tunnel_to(report.endpoint, host)
    if tunnel is not None:
        session.out.note(f"the address is {host}'s own; true here while this runs: {tunnel}")
    if report.key_command is None:
        return report
    key = report.key_command.replace("stackctl", remote.remote_command(host), 1)
    return msgspec.structs.replace(report, key_command=key)


def tunnel_to(endpoint: str, host: str) -> str | None:
    """Return the ssh command that makes a box's endpoint reachable here under the same address.

    Return None if other machines can reach the endpoint: its address is not a loopback address.
    """
    netloc = urlsplit(endpoint).netloc
    name, _, port = netloc.rpartition(":")
    if not ipaddress.ip_address(name.strip("[]")).is_loopback:
        return None
    return f"ssh -N -L {shlex.quote(f'{port}:{name}:{port}')} {shlex.quote(host)}"


def _key_export(command: str) -> str:
    return f'export OPENAI_API_KEY="$({command})"'


def _print(session: Session, report: ClientReport) -> None:
    """Print each file below its name, and the reasons on stderr."""
    for number, file in enumerate(report.files):
        session.out.line(("\n" if number else "") + f"# {file.name}")
        session.out.line(file.text.rstrip("\n"))
        for reason in file.reasons:
            session.out.note(f"  {reason}")
    if report.key_command is not None:
        session.out.note("aider takes the key from its environment:")
        session.out.note(f"  {_key_export(report.key_command)}")
    session.out.note(f"stackctl client aider {report.stack} --write puts them into this folder")


def _resolved(path: Path) -> Path:
    """Return the real path of a file, so that writing keeps a link a link."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle: opening the path reports them
        return path.absolute()


def _present(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise StackctlError(
                f"{path} is too large for a settings file", exit_code=ExitCode.USAGE
            )
        return raw.decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StackctlError(
            f"{path} cannot be read: {reason}",
            hint="mend it, or move it away",
            exit_code=ExitCode.USAGE,
        ) from None


def _show(session: Session, path: Path, present: str | None, text: str) -> None:
    lines = difflib.unified_diff(
        (present or "").splitlines(),
        text.splitlines(),
        str(path) if present is not None else "/dev/null",
        str(path),
        lineterm="",
    )
    for line in lines:
        session.out.note(session.out.diff_line(without_keys(line)))


def without_keys(line: str) -> str:
    """Return a line of a diff with the values of keys replaced by dots."""
    return _KEY.sub(r"\1...", line)


def _write(changed: list[tuple[Path, str | None, str]]) -> None:
    from stackctl.machine.files import write_atomically

    for path, present, text in changed:
        mode = path.stat().st_mode & 0o777 if present is not None else 0o644
        # The file keeps its mode because it may hold keys; its folder keeps its own.
        write_atomically(path, text, mode=mode, keep_folder=True)
