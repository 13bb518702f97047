"""Long texts from outside, such as logs, line by line and never all at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError

#: A longer line is split into several.
_MOST_LINE_BYTES = 64 * 2**10
_COLOR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, or of stdin for ``-``, without colour codes.

    Bytes that are not UTF-8 are replaced. Raises StackctlError (exit 2) if the file cannot be read.
    """
    try:
        with os.fdopen(os.dup(0), "rb") if path == "-" else Path(path).open("rb") as stream:
            while raw := stream.readline(_MOST_LINE_BYTES):
                yield _plain(raw)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StackctlError(
            f"cannot read {'stdin' if path == '-' else path}: {why}", exit_code=ExitCode.USAGE
        ) from None


def _plain(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").rstrip("\r\n")
    return text if "\x1b" not in text else _COLOR.sub("", text)
