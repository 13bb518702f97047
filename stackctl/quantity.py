"""Parse and print quantities: bytes, tokens, durations, numbers and shares.

Values are always bytes, tokens and seconds; only text carries a unit.
"""

from __future__ import annotations

import math
import re

from stackctl.errors import ExitCode, StackctlError

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
#: No real size has more than 18 digits before the point, and far more would overflow a float.
_BYTES = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION = re.compile(
    r"(?:(\d{1,18})h)?\s*(?:(\d{1,18})m)?\s*(?:(\d{1,18}(?:\.\d+)?)s?)?", re.IGNORECASE
)
_TOKENS = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([kK]?)")


_VERSION_NUMBER = re.compile(r"[0-9]{1,6}")


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; fewer if it has fewer."""
    return tuple(int(number) for number in _VERSION_NUMBER.findall(version)[:2])


def _bad(what: str, text: str, example: str) -> StackctlError:
    return StackctlError(
        f"{text!r} is not a {what}", hint=f"write it like {example}", exit_code=ExitCode.USAGE
    )


def parse_bytes(text: str) -> int:
    """Return the bytes of ``4 GiB``, ``16g`` or ``512``.

    Units are powers of 1024, except ``kB``, ``MB``, ``GB`` and ``TB``, which are powers of 1000.

    Raises:
        StackctlError: exit 2 for any other text.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise _bad("size", text, "4 GiB")
    number, prefix, suffix = match.groups()
    if suffix and suffix.lower() == "b" and prefix:
        base = int(1000 ** ("kmgt".index(prefix.lower()) + 1))
    else:
        base = _BINARY[prefix.lower()]
    return round(float(number) * base)


def format_bytes(count: int) -> str:
    """Return bytes as text for people: ``241 MiB``, ``21.9 GiB``, with one decimal at most."""
    value = float(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    unit = units[0]
    digits = 0 if unit == "B" or abs(value) >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {unit}"


def parse_duration(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``2m`` or ``1h30m``.

    Raises:
        StackctlError: exit 2 for any other text.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise _bad("duration", text, "90s or 2m")
    hours, minutes, seconds = (float(part) if part else 0.0 for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def format_duration(seconds: float) -> str:
    """Return elapsed time as ``0:38`` or ``1:02:03``."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def format_number(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point.

    Examples: ``0.0042``, ``12.3``, ``1,234``. There is never an exponent.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def truncate(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters, with an ellipsis if it was longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def format_share(value: float) -> str:
    """Return a share (0 to 1) as ``12.5 %``; from 20 % on without a decimal."""
    percent = value * 100
    return f"{percent:.0f} %" if percent >= 20 or percent == round(percent) else f"{percent:.1f} %"


def parse_tokens(text: str) -> int:
    """Return the tokens of ``8192``, ``16K`` (x 1024) or ``25.6k`` (x 1000).

    Engines that accept a suffix read it this way.

    Raises:
        StackctlError: exit 2 for any other text.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        raise _bad("number of tokens", text, "8192 or 16K")
    number, unit = match.groups()
    return int(float(number) * {"": 1, "k": 1000, "K": 1024}[unit])
