"""``stackctl image``."""

from __future__ import annotations

from pathlib import Path

import click

from stackctl.cli.session import Session, verb


@click.group("image")
def command() -> None:
    """Build or load engine images on machines without a registry."""


@verb("build")
@click.argument("engine", type=click.Choice(["llama-cpp"]))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the archive there and stop: it can be carried to a machine without network.",
)
@click.option("--mirror", metavar="URL", help="Debian mirror; default: as mmdebstrap chooses.")
def build(session: Session, engine: str, output: Path | None, mirror: str | None) -> None:
    """Build an image of ENGINE from Debian's packages (needs mmdebstrap)."""
    from stackctl.deploy.imagebuild import build_llama_cpp

    assert engine == "llama-cpp"
    session.out.line(build_llama_cpp(session.out, output, mirror))


@verb("load")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load(session: Session, archive: Path) -> None:
    """Load ARCHIVE as the local llama.cpp image.

    ARCHIVE is what "stackctl image build -o" or "podman save" wrote.
    """
    from stackctl.deploy.imagebuild import load_llama_cpp

    session.out.line(load_llama_cpp(session.out, archive))


command.add_command(build)
command.add_command(load)
