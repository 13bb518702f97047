"""Installs and removes the timer that runs ``stackctl guard``."""

from __future__ import annotations

import sys
from pathlib import Path

import stackctl
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security
from stackctl.machine.files import write_atomically
from stackctl.resources import data_folder
from stackctl.units import quoting

TIMER = "stackctl-guard.timer"
SERVICE = "stackctl-guard.service"
#: Placeholder of the program's path in the shipped service.
_PLACE = "@STACKCTL@"


def install_timer(context: Context, program: tuple[str, ...]) -> tuple[Path, ...]:
    """Write the units that run ``program``, start the timer, and return the paths of the units.

    Raises:
        StackctlError: exit 5 for the system's units if not only root can change the program.
    """
    if context.paths.scope == "system":
        for path in (Path(program[0]), Path(sys.executable), Path(stackctl.__file__)):
            _require_roots_own(path)
    context.systemd.require()
    shipped = data_folder("systemd") / context.paths.scope
    folder = _folder(context)
    for name in (SERVICE, TIMER):
        text = (shipped / name).read_text("utf-8")
        write_atomically(folder / name, text.replace(_PLACE, quoting.quote_words(program)))
    context.systemd.daemon_reload()
    context.systemd.enable(TIMER)
    return tuple(folder / name for name in (SERVICE, TIMER))


def remove_timer(context: Context) -> bool:
    """Stop the timer and remove its units; return False if there were none."""
    paths = [_folder(context) / name for name in (SERVICE, TIMER)]
    if not any(path.exists() for path in paths):
        return False
    context.systemd.disable(TIMER)
    for path in paths:
        path.unlink(missing_ok=True)
    context.systemd.daemon_reload()
    # A check that found a problem leaves a failed unit, which systemd would keep in its list.
    context.systemd.reset_failed(SERVICE)
    return True


def timer_installed(context: Context) -> bool:
    """Return True if the timer's unit file exists."""
    return (_folder(context) / TIMER).exists()


def _folder(context: Context) -> Path:
    """Return the folder of the units: systemd/SCOPE in /etc or in the user's configuration."""
    return context.paths.units.parents[2] / "systemd" / context.paths.scope


def _require_roots_own(path: Path) -> None:
    """Raise StackctlError (exit 5) if a user other than root could change a path."""
    if (why := path_security.find_weakness(path)) is not None:
        raise StackctlError(
            f"refusing timer: {why}",
            hint="install stackctl where only root can write, e.g. in a virtual environment in "
            "/opt",
            exit_code=ExitCode.REFUSED,
        )
