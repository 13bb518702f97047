"""The page of a stack, made from the stored measurements."""

from __future__ import annotations

from pathlib import Path

from stackctl import __version__
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import write_atomically
from stackctl.observe.report.view import StoredRun, View, build_view, format_time
from stackctl.resources import data_folder
from stackctl.state.bench_db import BenchDatabase
from stackctl.state.generations import utc_now
from stackctl.values.bench import BenchReport
from stackctl.values.generation import Generation

#: Pages begin with this mark, so that no other file is overwritten.
MARK = "<!-- stackctl report -->"
#: The most runs in the comparison.
_MOST_RUNS = 6


def report_html(context: Context, generation: Generation) -> str:
    """Return the page of a stack as HTML.

    It shows one run in full: the newest of this generation, else the newest of the stack. Beside it
    stand the newest runs of the other generations.

    Raises:
        StackctlError: the stored measurements cannot be read.
    """
    benches = BenchDatabase(context.paths.state)
    stored = [run for run in benches.reports(generation.stack) if run.has_answers and not run.box]
    shown = next((run for run in stored if run.generation == generation.number), None)
    shown = shown or next(iter(stored), None)
    latest = None
    if shown is not None and shown.id is not None:
        latest = StoredRun(shown, benches.samples(shown.id))
    return render_view(generation, build_view(generation, latest, _beside(stored, shown)))


def render_view(generation: Generation, parts: View) -> str:
    """Return a view as HTML."""
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
        made=format_time(utc_now()),
    )


def _beside(stored: list[BenchReport], shown: BenchReport | None) -> tuple[BenchReport, ...]:
    """Return the newest run of each generation, oldest first; ``stored`` is newest first."""
    newest: dict[int, BenchReport] = {}
    for run in ([shown] if shown else []) + stored:
        newest.setdefault(run.generation, run)
    ordered = sorted(newest.values(), key=lambda run: run.id or 0)
    return tuple(ordered[-_MOST_RUNS:])


def write_page(path: Path, text: str) -> None:
    """Write a page to a new file or over an earlier page.

    Raises:
        StackctlError: exit 5 if another file is there; exit 1 if the page cannot be written.
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
