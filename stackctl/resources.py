"""Finds templates/, profiles/ and systemd/ in an installed wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path

from stackctl.errors import StackctlError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Return a shipped folder: ``_data/NAME`` in a wheel, beside the package in a checkout.

    Both places exist because a wheel cannot hold folders outside its package, and an editable
    install cannot hold copies.

    Raises:
        StackctlError: the folder is in neither place.
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise StackctlError(
        f"this installation has no {name} folder (looked beside {_PACKAGE})",
        hint="reinstall stackctl-inference",
    )
