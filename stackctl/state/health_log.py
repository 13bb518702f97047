"""The health of a stack over time: ``STATE/stacks/STACK/health.jsonl``."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec

from stackctl.state import jsonl
from stackctl.values.history import HealthEntry

_MOST_BYTES = 256 * 2**10
_KEEP = 1000
#: An unchanged state is recorded at most once within this time.
_SAME_S = 60


def record(state: Path, stack: str, health: HealthEntry) -> bool:
    """Add a health state: a change at once, an unchanged state at most once a minute.

    Return True when it was written. Raise StackctlError when it cannot be stored.
    """
    health = msgspec.structs.replace(health, message=jsonl.truncate(health.message))
    before = last(state, stack)
    if before is not None and _same(before, health):
        return False
    jsonl.append_value(_path(state, stack), health, most_bytes=_MOST_BYTES, keep=_KEEP)
    return True


def read(state: Path, stack: str) -> tuple[HealthEntry, ...]:
    """Return all states, oldest first. Raise StackctlError when the log is not ours to read."""
    found = jsonl.newest_first(_path(state, stack), HealthEntry, most_bytes=_MOST_BYTES)
    return tuple(reversed(tuple(found)))


def last(state: Path, stack: str) -> HealthEntry | None:
    """Return the last state; it may be a minute older than the last check."""
    found = jsonl.newest_first(_path(state, stack), HealthEntry, most_bytes=_MOST_BYTES)
    return next(found, None)


def _same(before: HealthEntry, after: HealthEntry) -> bool:
    if msgspec.structs.replace(before, when=after.when) != after:
        return False
    try:
        passed = _moment(after.when) - _moment(before.when)
    except (ValueError, TypeError):
        return False
    return 0 <= passed.total_seconds() < _SAME_S


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _path(state: Path, stack: str) -> Path:
    return state / "stacks" / stack / "health.jsonl"
