"""Quote values for Quadlet and systemd unit files so that the engine gets them byte for byte.

Quadlet escapes neither ``%`` (systemd's specifiers) nor ``$`` (its variables), so both are doubled.
A value that no quoting preserves is refused with the reason; tests/lab/test_quoting.py proves both
with the real Quadlet and systemd.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from stackctl.errors import ExitCode, StackctlError

#: The kernel accepts no longer argument or variable (MAX_ARG_STRLEN, its ending zero included).
LONGEST_WORD = 128 * 1024 - 1
#: systemd reads no longer line (LONG_LINE_MAX), and Quadlet writes a whole unit's command into one.
LONGEST_UNIT = 1024 * 1024 - 16 * 1024
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./$-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def quote_raw(value: str) -> str:
    """Quote a value of a key that Quadlet copies verbatim (Image, Volume, HealthCmd).

    Raise StackctlError (exit 2) for text that such a key cannot hold.
    """
    _refuse_odd(value)
    if value != value.strip() or value.endswith("\\") or not value:
        raise _error(value, "spaces or a backslash at its end")
    return _double(value)


def quote_text(value: str) -> str:
    """Quote text of a systemd key that expands specifiers but no variables (Description)."""
    _refuse_odd(value)
    return value.replace("%", "%%")


def quote_words(values: Iterable[str]) -> str:
    """Quote the arguments of a key that Quadlet splits into words (Exec, PodmanArgs, Environment).

    Quadlet ends a list of words at an empty one, and takes the quotes off a lone ``;``, with which
    systemd begins another command.
    """
    return " ".join(_word(value) for value in values)


def join_variable(value: str) -> str:
    """Check and return a variable ``NAME=value``, unquoted. Podman misreads other names."""
    if not _VARIABLE.match(value):
        raise _error(value, "it is not NAME=value")
    return value


def join_volume(source: str, target: str, options: str) -> str:
    """Return a volume as Podman takes it, unquoted. Raise for a path with a colon."""
    for path in (source, target):
        if ":" in path:
            raise StackctlError(
                f"{path!r}: a path with a colon cannot be mounted",
                hint="rename it, or give the path of a link without one",
                exit_code=ExitCode.USAGE,
            )
    return f"{source}:{target}:{options}"


def is_plain_path(path: str) -> bool:
    """Return True when Quadlet can take a path in Volume.

    It copies the path unquoted into RequiresMountsFor, where a space ends it and ``$`` is itself.
    """
    return not re.search(r"[\s\"'\\\\$]", path)


def mount_point(path: str) -> str:
    """Return a path for RequiresMountsFor, cut to the parent folder at a quote or backslash."""
    whole = re.split(r'["\\\\]', path, maxsplit=1)[0]
    if whole != path:
        whole = whole.rpartition("/")[0] or "/"
    return '"' + whole.replace("%", "%%") + '"'


def checked_unit_text(text: str) -> str:
    """Return the text of a unit. Raise when systemd could not read the service made from it."""
    if len(text.encode()) > LONGEST_UNIT:
        raise StackctlError(
            f"the engine's arguments and variables are longer than {LONGEST_UNIT // 1024} KiB",
            hint="a unit file holds no more; shorten engine_args",
            exit_code=ExitCode.USAGE,
        )
    return text


def _word(value: str) -> str:
    _refuse_odd(value)
    if not value:
        raise _error(value, "it is empty")
    if value == ";":
        raise _error(value, "it begins another command")
    if len(value.encode()) > LONGEST_WORD:
        raise _error(value, f"it is longer than {LONGEST_WORD} bytes")
    if _PLAIN.fullmatch(value):
        return _double(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_double(escaped)}"'


def _double(value: str) -> str:
    return value.replace("%", "%%").replace("$", "$$")


def _refuse_odd(value: str) -> None:
    for char in value:
        category = unicodedata.category(char)
        if category == "Cc":
            raise _error(value, "a control character such as a newline or tab")
        # systemd skips a line with either, Quadlet's ExecStart= included.
        if category == "Cs" or ord(char) & 0xFFFE == 0xFFFE or "\ufdd0" <= char <= "\ufdef":
            raise _error(value, f"U+{ord(char):04X}, which is not a character")


def _error(value: str, why: str) -> StackctlError:
    shown = repr(value) if len(value) <= 60 else f"{value[:40]!r}..."
    return StackctlError(
        f"{shown} cannot be written into a unit file: {why}",
        hint="change it where it comes from: the profile, or the name of the model's file",
        exit_code=ExitCode.USAGE,
    )
