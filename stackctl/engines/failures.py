"""Failures that engines' logs show, and tables that recognise them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FailureTable = Sequence[tuple[re.Pattern[str], str, str | None]]


@dataclass(frozen=True)
class Failure:
    """A failure recognised in an engine's log: cause in one line, its evidence, a remedy.

    ``sets`` is the remedy as KEY=VALUE if the engine named the value. ``kernel`` is True if other
    kernels of the same image avoid the failure.
    """

    cause: str
    evidence: str
    remedy: str | None = None
    sets: tuple[str, ...] = ()
    kernel: bool = False


def failure_table(*rows: tuple[str, str, str | None]) -> FailureTable:
    """Make a table from rows of pattern (any case), cause and remedy, most specific first."""
    return tuple((re.compile(text, re.IGNORECASE), cause, remedy) for text, cause, remedy in rows)


def first_match(lines: Iterable[str], table: FailureTable) -> Failure | None:
    """Return the failure of the first row of a table that any line matches.

    Cause and remedy may use the pattern's named groups as ``{name}``.
    """
    kept = list(lines)
    for pattern, cause, remedy in table:
        for line in kept:
            if match := pattern.search(line):
                groups = {key: value or "" for key, value in match.groupdict().items()}
                return Failure(
                    cause.format(**groups),
                    line.strip(),
                    remedy.format(**groups) if remedy is not None else None,
                )
    return None
