"""Recipes of images that ``stackctl image build`` makes from packages. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Folder in which Debian's Python finds packages that are not Debian's.
PACKAGES = "usr/local/lib/python{python}/dist-packages"


@dataclass(frozen=True)
class Wheels:
    """Packages of PyPI for one Python (X.Y), without the paths that match ``left_out``.

    ``program`` starts ``function`` of ``module``. ``alias`` is a name and version under which the
    first package is known as well.
    """

    requirement: str
    python: str
    program: str
    module: str
    function: str
    alias: tuple[str, str]
    left_out: tuple[str, ...]
    hint: str

    @property
    def hooks(self) -> tuple[str, ...]:
        """Return commands to run in the finished root ($1): compile for its Python, then start it.

        The root of a container is read-only, so code that is not compiled here would be compiled
        at each start.
        """
        folder = "/" + PACKAGES.format(python=self.python)
        return (
            'chroot "$1" chown -R 0:0 /usr/local',
            # Some packages carry templates and code for other versions, which do not compile.
            f'chroot "$1" python3 -m compileall -q -j 0 {folder} >/dev/null || true',
            f'chroot "$1" {self.program} --version',
        )


@dataclass(frozen=True)
class ImageRecipe:
    """An image that can be built on this machine.

    Args:
        name: the name on the command line.
        image: the reference under which the image is kept, and looked for first.
        about: the contents of the image, for the help text.
        suite: suite of Debian.
        packages: packages of Debian; the first one is the program's.
        wheels: packages of PyPI on top, for a program that is not in Debian.
    """

    name: str
    image: str
    about: str
    suite: str
    packages: tuple[str, ...]
    wheels: Wheels | None = None
