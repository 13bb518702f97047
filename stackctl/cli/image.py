"""``stackctl image``."""

from __future__ import annotations

from pathlib import Path

import click

from stackctl.cli.session import Session, stackctl_command
from stackctl.deploy import image_build


@click.group("image")
def command() -> None:
    """Build or load images on machines without a registry."""


_RECIPES = image_build.recipes()
#: Names of the images with a recipe; the first is the default of ``load``.
IMAGES = tuple(_RECIPES)
_ABOUT = "; ".join(f"{recipe.name} is {recipe.about}" for recipe in _RECIPES.values())


@stackctl_command("build")
@click.argument("image", type=click.Choice(IMAGES))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the archive there and stop: it can be carried to a machine without network.",
)
@click.option("--mirror", metavar="URL", help="Debian mirror; default: as mmdebstrap chooses.")
def build(session: Session, image: str, output: Path | None, mirror: str | None) -> None:
    """Build IMAGE from Debian's packages (needs mmdebstrap)."""
    session.out.line(image_build.build_image(session.out, _RECIPES[image], output, mirror))


build.help = f"{build.help}\n\nImages: {_ABOUT}."


def _image_and_archive(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[str, Path]:
    """Return the image and the archive of ``[IMAGE] ARCHIVE``, which click cannot parse itself."""
    if len(words) > 2:
        raise click.UsageError(f"Got unexpected extra argument ({words[2]})", context)
    image = click.Choice(IMAGES).convert(words[0], parameter, context) if words[1:] else IMAGES[0]
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return image, Path(path.convert(words[-1], parameter, context))


@stackctl_command("load")
@click.argument(
    "what",
    nargs=-1,
    required=True,
    metavar=f"[{'|'.join(IMAGES)}] ARCHIVE",
    callback=_image_and_archive,
)
def load(session: Session, what: tuple[str, Path]) -> None:
    """Load ARCHIVE as a local image; default: the first name in the usage line.

    ARCHIVE is a file that "stackctl image build -o" or "podman save" has written.
    """
    image, archive = what
    session.out.line(image_build.load_image(session.out, _RECIPES[image], archive))


command.add_command(build)
command.add_command(load)
