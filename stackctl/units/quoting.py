"""Writes values into Quadlet and systemd unit files so that they come out as they went in.

Quadlet escapes neither ``%`` (systemd's specifiers) nor ``$`` (its variables), so both are doubled.
A unit file has no way to write a newline into a key, so control characters are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from stackctl.errors import ExitCode, StackctlError

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./$-]+")


def raw(value: str) -> str:
    """A value of a key that Quadlet takes as it stands (Image, Volume, HealthCmd).

    Raises StackctlError (exit 2) for text that such a key cannot hold.
    """
    _refuse_control(value)
    if value != value.strip() or value.endswith("\\") or not value:
        raise StackctlError(
            f"{value!r} cannot be written into a unit file",
            hint="no spaces at its ends and no backslash at its end",
            exit_code=ExitCode.USAGE,
        )
    return _double(value)


def text(value: str) -> str:
    """Text inside a key of systemd's own that knows specifiers but no variables (Description)."""
    _refuse_control(value)
    return value.replace("%", "%%")


def words(values: Iterable[str]) -> str:
    """Arguments of a key that is split into words (Exec, PodmanArgs, Environment)."""
    return " ".join(_word(value) for value in values)


def volume(source: str, target: str, options: str) -> str:
    """A volume as Podman takes it, not yet quoted. A path with a colon cannot be written."""
    for path in (source, target):
        if ":" in path:
            raise StackctlError(
                f"{path!r}: a path with a colon cannot be mounted",
                hint="rename it, or give the path of a link without one",
                exit_code=ExitCode.USAGE,
            )
    return f"{source}:{target}:{options}"


def is_plain_path(path: str) -> bool:
    """Whether Quadlet can take a path in Volume.

    It copies the path unquoted into RequiresMountsFor, where a space ends it and ``$`` is itself.
    """
    return not re.search(r"[\s\"'\\\\$]", path)


def mount_point(path: str) -> str:
    """A path for RequiresMountsFor; one with a quote or backslash is cut to the folder above it."""
    whole = re.split(r'["\\\\]', path, maxsplit=1)[0]
    if whole != path:
        whole = whole.rpartition("/")[0] or "/"
    return '"' + whole.replace("%", "%%") + '"'


def _word(value: str) -> str:
    _refuse_control(value)
    if _PLAIN.fullmatch(value):
        return _double(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_double(escaped)}"'


def _double(value: str) -> str:
    return value.replace("%", "%%").replace("$", "$$")


def _refuse_control(value: str) -> None:
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise StackctlError(
            f"{value!r} has a control character, which a unit file cannot hold",
            hint="newlines and tabs are not possible here",
            exit_code=ExitCode.USAGE,
        )
