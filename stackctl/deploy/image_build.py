"""Builds images from packages of Debian and PyPI, for machines without a container registry."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path

from stackctl.deploy import image_wheels
from stackctl.deploy.context import Progress
from stackctl.engines import ENGINES
from stackctl.engines.image_recipe import ImageRecipe
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman, runner
from stackctl.quantity import format_bytes
from stackctl.values import proxy

#: The front door's image, which needs HAProxy only.
DOOR = ImageRecipe(
    name="haproxy",
    image=proxy.LOCAL_IMAGE,
    about="the front door",
    # Debian stable: its HAProxy 3.0 is a long-term branch with security updates.
    suite="trixie",
    packages=("haproxy",),
)


def recipes() -> dict[str, ImageRecipe]:
    """Return the recipes of all images by name, the engines' first."""
    of_engines = (recipe for engine in ENGINES.values() for recipe in engine.image_recipes)
    return {recipe.name: recipe for recipe in (*of_engines, DOOR)}


def build_image(
    progress: Progress, recipe: ImageRecipe, output: Path | None, mirror: str | None
) -> str:
    """Build the root file system; without ``output`` load it as the local image.

    Returns:
        The archive's path, or the image's name.

    Raises:
        StackctlError: exit 6 if mmdebstrap is absent; else with its messages.
    """
    if output is not None:
        _bootstrap(progress, recipe, output, mirror)
        return str(output)
    with tempfile.TemporaryDirectory(prefix="stackctl-image-", dir="/var/tmp") as folder:
        archive = Path(folder) / "root.tar"
        _bootstrap(progress, recipe, archive, mirror)
        return load_image(progress, recipe, archive)


def load_image(progress: Progress, recipe: ImageRecipe, archive: Path) -> str:
    """Load an archive as the local image of a recipe, which ``up`` prefers; return its name."""
    progress.progress("image", f"loading {archive.name}")
    podman.load_archive(archive, recipe.image)
    progress.step("image", f"{recipe.image}, {format_bytes(archive.stat().st_size)}")
    return recipe.image


def _bootstrap(progress: Progress, recipe: ImageRecipe, target: Path, mirror: str | None) -> None:
    try:
        # A private folder: nobody else can put a link there while the archive is written.
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    partial = folder / target.name
    try:
        hooks: tuple[str, ...] = ()
        if recipe.wheels:
            tree = image_wheels.install_wheels(progress, recipe.wheels, folder / "root")
            hooks = (f"copy-in {shlex.quote(str(tree))} /", *recipe.wheels.hooks)
        progress.progress(
            "image", f"installing {recipe.packages[0]} from Debian {recipe.suite}, about a minute"
        )
        command = (
            "mmdebstrap", "--variant=apt", "--format=tar", "--quiet",
            f"--include={','.join(recipe.packages)}",
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            # A mirror with an old snapshot must not stop the build of a local image.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            *(f"--customize-hook={hook}" for hook in hooks),
            recipe.suite, str(partial), *((mirror,) if mirror else ()),
        )  # fmt: skip
        try:
            runner.run(command, timeout_s=1800, extra_env=image_wheels.large_tmp_env())
        except StackctlError as error:
            if error.exit_code == ExitCode.HOST:
                error.hint = "apt-get install mmdebstrap (Debian and Ubuntu; needs root)"
            raise
        partial.replace(target)
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress.step("image", f"{target}, {format_bytes(target.stat().st_size)}")
