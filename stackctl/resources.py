"""Finds templates/, profiles/ and systemd/ in an installed wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path

from stackctl.errors import StackctlError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The shipped folder of that name: ``_data/NAME`` in a wheel, beside the package in a checkout.

    A wheel cannot hold folders outside its package, and an editable install cannot hold copies:
    hence both places, the wheel's first.
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise StackctlError(
        f"this installation has no {name} folder (looked beside {_PACKAGE})",
        hint="reinstall stackctl-inference",
    )
