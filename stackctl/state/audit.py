"""The audit log of changes (user, verb, time, outcome): ``STATE/audit.jsonl``."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path

import msgspec

from stackctl.state import jsonl, keys
from stackctl.values.history import AuditEntry

_MOST_BYTES = 2**20
_KEEP = 2000


def record(state: Path, entry: AuditEntry) -> None:
    """Add an entry. Raise StackctlError when it cannot be stored (the disk is full)."""
    message = jsonl.truncate(entry.message)
    if message is not None:
        # Messages quote other programs. A key must not reach the log, whatever they print.
        message = keys.redact_keys(message)
    entry = msgspec.structs.replace(entry, message=message)
    jsonl.append_value(state / "audit.jsonl", entry, most_bytes=_MOST_BYTES, keep=_KEEP)


def read(state: Path) -> tuple[AuditEntry, ...]:
    """Return all entries, oldest first. Raise StackctlError when the log is not ours to read."""
    found = jsonl.newest_first(state / "audit.jsonl", AuditEntry, most_bytes=_MOST_BYTES)
    return tuple(reversed(tuple(found)))


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
