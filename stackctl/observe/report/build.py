"""Puts the page together from what is stored."""

from __future__ import annotations

from pathlib import Path

from stackctl import __version__
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import write_atomically
from stackctl.observe.report.view import Measured, View, moment, view
from stackctl.resources import data_folder
from stackctl.state.benches import Benches
from stackctl.state.generations import now
from stackctl.values.bench import BenchReport
from stackctl.values.generation import Generation

#: By this an earlier page is told from any other file.
MARK = "<!-- stackctl report -->"
#: Runs beside the one that is shown in full.
_MOST_RUNS = 6


def page(context: Context, generation: Generation) -> str:
    """The page of a stack as HTML: its newest measurement in full, and the newest of each other
    generation beside it. Raises StackctlError when what is stored cannot be read."""
    benches = Benches(context.paths.state)
    stored = [run for run in benches.reports(generation.stack) if run.answered and not run.box]
    shown = next((run for run in stored if run.generation == generation.number), None)
    shown = shown or next(iter(stored), None)
    latest = None
    if shown is not None and shown.id is not None:
        latest = Measured(shown, benches.samples(shown.id))
    return render(generation, view(generation, latest, _beside(stored, shown)))


def render(generation: Generation, parts: View) -> str:
    """A view as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    basis = generation.plan.prediction.basis
    return environment.get_template("report.html.j2").render(
        view=parts,
        stack=generation.stack,
        basis={"measured": "from measurements of this machine"}.get(basis or "", "estimates"),
        version=__version__,
        made=moment(now()),
    )


def _beside(stored: list[BenchReport], shown: BenchReport | None) -> tuple[BenchReport, ...]:
    """The newest run of each generation, oldest first; ``stored`` is newest first."""
    newest: dict[int, BenchReport] = {}
    for run in ([shown] if shown else []) + stored:
        newest.setdefault(run.generation, run)
    ordered = sorted(newest.values(), key=lambda run: run.id or 0)
    return tuple(ordered[-_MOST_RUNS:])


def write(path: Path, text: str) -> None:
    """Write a page over an earlier one, and over nothing else.

    Raises:
        StackctlError: exit 5 when there is a file that is no page of ours; exit 1 when it cannot be
            written.
    """
    try:
        with path.open("rb") as stream:
            ours = MARK.encode() in stream.read(200)
    except FileNotFoundError:
        ours = True
    except OSError as error:
        raise StackctlError(f"cannot write {path}: {error.strerror}") from None
    if not ours:
        raise StackctlError(
            f"{path} exists and is not a report",
            hint="-o FILE names another",
            exit_code=ExitCode.REFUSED,
        )
    write_atomically(path, text)
