"""Logs of values, one JSON document a line, newest last. Damaged lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import append_line, read_private
from stackctl.values.base import V, Value, from_json, to_json

#: No line written here is longer, so a longer one is damage.
_LONGEST = 16 * 2**10


def append_value(path: Path, value: Value, *, most_bytes: int, keep: int) -> None:
    """Add a value. Raise StackctlError when it cannot be stored."""
    line = to_json(value, indent=-1).rstrip("\n").encode()
    append_line(path, line, most_bytes=most_bytes, keep=keep)


def newest_first(path: Path, kind: type[V], *, most_bytes: int) -> Iterator[V]:
    """Yield the values of a log; none when there is no log.

    Raises:
        StackctlError: it is not a file of this user's own, or cannot be read.
    """
    # The newest line may end beyond the size at which the log is cut.
    raw = read_private(path, most_bytes + _LONGEST) or b""
    for line in reversed(raw.split(b"\n")):
        if not line or len(line) > _LONGEST:
            continue
        try:
            yield from_json(line, kind, where=path.name)
        except StackctlError:
            continue


def truncate(text: str | None, most: int = 1000) -> str | None:
    """Return a message cut to the length that a log keeps."""
    return text if text is None or len(text) <= most else text[: most - 1] + "…"
