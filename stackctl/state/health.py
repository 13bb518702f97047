"""How well a stack was over time: ``STATE/stacks/STACK/health.jsonl``."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec

from stackctl.state import lines
from stackctl.values.history import Health

_MOST_BYTES = 256 * 2**10
_KEEP = 1000
#: The same again within this time tells nothing new.
_SAME_S = 60


def record(state: Path, stack: str, health: Health) -> bool:
    """Add what was seen: a change at once, the same again at most once a minute.

    Returns whether it was written. Raises StackctlError when it cannot be stored.
    """
    health = msgspec.structs.replace(health, message=lines.shortened(health.message))
    before = last(state, stack)
    if before is not None and _same(before, health):
        return False
    lines.append(_path(state, stack), health, most_bytes=_MOST_BYTES, keep=_KEEP)
    return True


def read(state: Path, stack: str) -> tuple[Health, ...]:
    """What was seen, oldest first. Raises StackctlError when the log is not ours to read."""
    found = lines.newest_first(_path(state, stack), Health, most_bytes=_MOST_BYTES)
    return tuple(reversed(tuple(found)))


def last(state: Path, stack: str) -> Health | None:
    """What was seen last; it may be a minute older than the last look."""
    found = lines.newest_first(_path(state, stack), Health, most_bytes=_MOST_BYTES)
    return next(found, None)


def _same(before: Health, after: Health) -> bool:
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
