"""Packages of PyPI in an image: pip of this machine puts them there, set up as its user likes.

Nothing of Python runs in the image meanwhile, so a normal user can do it, and pip's settings (an
index, a folder of wheels, a proxy) count as they do elsewhere on this machine.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stackctl.deploy.context import Report
from stackctl.engines.image_recipe import PACKAGES, Wheels
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner

#: Seconds for pip: some GB over a slow line.
_PIP_S = 7200
#: Variables by which pip is told where to find packages. What runs other programs or writes
#: elsewhere is not among them: root may have them from another user (``sudo -E``).
_PIP_SETTINGS = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONFIG_FILE",
    "PIP_CONSTRAINT", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_TRUSTED_HOST", "PIP_PROXY",
    "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "PIP_RETRIES",
)  # fmt: skip
#: Settings of pip that are about where to install, and so not about ours; and no module of the
#: folder where we were called, which may be another user's.
_OURS = {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_USER": "0", "PYTHONSAFEPATH": "1"}


def install(report: Report, wheels: Wheels, root: Path) -> Path:
    """Put the packages below ``root``; the folder to copy into the image's root.

    Raises:
        StackctlError: exit 6 without a pip; else with pip's own words.
    """
    folder = root / PACKAGES.format(python=wheels.python)
    folder.mkdir(parents=True)
    report.progress("image", f"installing {wheels.requirement} with pip, some minutes")
    python = f"python{wheels.python}"  # whose conditions its own pip knows best
    try:
        runner.run(
            (
                *pip(python, "python3"), "install", "--quiet", "--no-compile",
                "--disable-pip-version-check", "--no-input", f"--python-version={wheels.python}",
                "--only-binary=:all:", f"--target={folder}", wheels.requirement,
            ),
            timeout_s=_PIP_S,
            extra_env=pip_environment() | roomy(),
        )  # fmt: skip
    except StackctlError as error:
        error.hint = error.hint or wheels.hint
        raise
    for pattern in wheels.left_out:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    name, version = wheels.alias
    alias = folder / f"{name}-{version}.dist-info/METADATA"
    alias.parent.mkdir()
    alias.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    program = root / "usr/local/bin" / wheels.program
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/usr/bin/python3\nimport sys\n\n"
        f"from {wheels.module} import {wheels.function}\n\n"
        # Processes that it starts import this file once more.
        f'if __name__ == "__main__":\n    sys.exit({wheels.function}())\n'
    )
    program.chmod(0o755)
    return root / "usr"


def roomy() -> dict[str, str]:
    """Variables for programs that write some GB to a temporary folder: /tmp may be in memory."""
    return {} if "TMPDIR" in runner.controlled_environment() else {"TMPDIR": "/var/tmp"}


def pip_environment() -> dict[str, str]:
    """Variables for a pip that installs into a folder."""
    return {name: os.environ[name] for name in _PIP_SETTINGS if name in os.environ} | _OURS


def pip(*pythons: str) -> tuple[str, ...]:
    """The words that start a pip, that of the first of these programs that has one.

    Raises StackctlError (exit 6) when none has.
    """
    for program in pythons:
        words = (program, "-m", "pip")
        if not shutil.which(program):
            continue
        if runner.run((*words, "--version"), check=False, extra_env=_OURS).status == 0:
            return words
    raise StackctlError(
        "there is no pip on this machine",
        hint="apt-get install python3-pip",
        exit_code=ExitCode.HOST,
    )
