"""The log of changes (user, verb, time, outcome), ``STATE/audit.jsonl``, and the health of each
stack over time, ``STATE/stacks/STACK/health.jsonl``.

Both have one JSON document a line, the newest last. Damaged lines are skipped.
"""

from __future__ import annotations

import datetime
import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.files import append_line, read_private
from stackctl.quantity import truncate
from stackctl.state import keys
from stackctl.values.base import V, Value, from_json, to_json
from stackctl.values.history import AuditEntry, HealthEntry

#: The size at which a log is cut, and the number of newest lines that stay then.
_CHANGES_LIMIT = (2**20, 2000)
_HEALTH_LIMIT = (256 * 2**10, 1000)
#: No line written here is longer, so a longer one is damage.
_LONGEST = 16 * 2**10
_LONGEST_MESSAGE = 1000
#: An unchanged state of health is recorded at most once within this time.
_SAME_S = 60


def record_change(state: Path, entry: AuditEntry) -> None:
    """Add a change. Raise StackctlError when it cannot be stored (the disk is full)."""
    if entry.message is not None:
        # Messages quote other programs. A key must not reach the log, whatever they print.
        message = keys.redact_keys(truncate(entry.message, _LONGEST_MESSAGE))
        entry = msgspec.structs.replace(entry, message=message)
    _append(state / "audit.jsonl", entry, _CHANGES_LIMIT)


def read_changes(state: Path) -> tuple[AuditEntry, ...]:
    """Return all changes, oldest first. Raise StackctlError when the log is not ours to read."""
    found = _newest_first(state / "audit.jsonl", AuditEntry, _CHANGES_LIMIT)
    return tuple(found)[::-1]


def current_user() -> str:
    """Return the login name of the real user and, in parentheses, of the user who became it by
    sudo or pkexec, as in ``root (alice)``."""
    name = _login(os.getuid())
    behind = os.environ.get("SUDO_USER") or ""
    caller = os.environ.get("PKEXEC_UID") or ""
    if not behind and re.fullmatch("[0-9]{1,9}", caller):
        behind = _login(int(caller))
    # Users can set these variables themselves, so only valid login names are accepted.
    known = re.fullmatch(r"[\w.@\\+-]{1,64}\$?", behind) is not None and behind != name
    return f"{name} ({behind})" if known else name


def _login(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)


def record_health(state: Path, stack: str, health: HealthEntry) -> bool:
    """Add a health state: a change at once, an unchanged state at most once a minute.

    Return True when it was written. Raise StackctlError when it cannot be stored.
    """
    if health.message is not None:
        message = truncate(health.message, _LONGEST_MESSAGE)
        health = msgspec.structs.replace(health, message=message)
    before = last_health(state, stack)
    if before is not None and _same(before, health):
        return False
    _append(_health_path(state, stack), health, _HEALTH_LIMIT)
    return True


def read_health(state: Path, stack: str) -> tuple[HealthEntry, ...]:
    """Return all states, oldest first. Raise StackctlError when the log is not ours to read."""
    return tuple(_newest_first(_health_path(state, stack), HealthEntry, _HEALTH_LIMIT))[::-1]


def last_health(state: Path, stack: str) -> HealthEntry | None:
    """Return the last state; it may be a minute older than the last check."""
    return next(_newest_first(_health_path(state, stack), HealthEntry, _HEALTH_LIMIT), None)


def _same(before: HealthEntry, after: HealthEntry) -> bool:
    if msgspec.structs.replace(before, when=after.when) != after:
        return False
    then, now = before.when, after.when
    try:
        passed = datetime.datetime.fromisoformat(now) - datetime.datetime.fromisoformat(then)
    except (ValueError, TypeError):
        return False
    return 0 <= passed.total_seconds() < _SAME_S


def _health_path(state: Path, stack: str) -> Path:
    return state / "stacks" / stack / "health.jsonl"


def _append(path: Path, value: Value, limit: tuple[int, int]) -> None:
    line = to_json(value, indent=-1).rstrip("\n").encode()
    append_line(path, line, most_bytes=limit[0], keep=limit[1])


def _newest_first(path: Path, kind: type[V], limit: tuple[int, int]) -> Iterator[V]:
    """Yield the values of a log; none when there is no log."""
    # The newest line may end beyond the size at which the log is cut.
    raw = read_private(path, limit[0] + _LONGEST) or b""
    for line in reversed(raw.split(b"\n")):
        if not line or len(line) > _LONGEST:
            continue
        try:
            yield from_json(line, kind, where=path.name)
        except StackctlError:
            continue
