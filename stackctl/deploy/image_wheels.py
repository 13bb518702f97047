"""Installs packages of PyPI for an image, with the pip of this machine.

No Python runs in the image meanwhile, so an ordinary user can build it. The user's settings of pip
(an index, a folder of wheels, a proxy) apply.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stackctl.deploy.context import Progress
from stackctl.engines.image_recipe import PACKAGES, Wheels
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner

#: Seconds that pip may take: some GB over a slow line.
_PIP_S = 7200
#: Variables that direct pip to packages. Those that make pip run programs or write elsewhere are
#: left out, because root may have inherited them from another user (``sudo -E``).
_PIP_SETTINGS = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONFIG_FILE",
    "PIP_CONSTRAINT", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_TRUSTED_HOST", "PIP_PROXY",
    "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "PIP_RETRIES",
)  # fmt: skip
#: Replacements of pip's settings for the place of installation, which do not apply to an image.
#: PYTHONSAFEPATH keeps Python from importing modules of the working folder, which may be another
#: user's.
_OURS = {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_USER": "0", "PYTHONSAFEPATH": "1"}


def install_wheels(progress: Progress, wheels: Wheels, root: Path) -> Path:
    """Install the packages below ``root``; return the folder to copy into the image's root.

    Raises:
        StackctlError: exit 6 without pip; else with pip's messages.
    """
    folder = root / PACKAGES.format(python=wheels.python)
    folder.mkdir(parents=True)
    progress.progress("image", f"installing {wheels.requirement} with pip, some minutes")
    python = f"python{wheels.python}"  # its own pip evaluates its markers
    try:
        runner.run(
            (
                *pip_command(python, "python3"), "install", "--quiet", "--no-compile",
                "--disable-pip-version-check", "--no-input", f"--python-version={wheels.python}",
                "--only-binary=:all:", f"--target={folder}", wheels.requirement,
            ),
            timeout_s=_PIP_S,
            extra_env=pip_environment() | large_tmp_env(),
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
        # Its worker processes import this file again.
        f'if __name__ == "__main__":\n    sys.exit({wheels.function}())\n'
    )
    program.chmod(0o755)
    return root / "usr"


def large_tmp_env() -> dict[str, str]:
    """Return variables for programs that write some GB to TMPDIR: /tmp may be in memory."""
    return {} if "TMPDIR" in runner.controlled_environment() else {"TMPDIR": "/var/tmp"}


def pip_environment() -> dict[str, str]:
    """Return variables for a pip that installs into a folder."""
    return {name: os.environ[name] for name in _PIP_SETTINGS if name in os.environ} | _OURS


def pip_command(*pythons: str) -> tuple[str, ...]:
    """Return the command of the first of these Pythons that has pip.

    Raises:
        StackctlError: exit 6 if none has.
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
