"""Who changed what, when, and how it went: ``STATE/audit.jsonl``."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path

import msgspec

from stackctl.state import keys, lines
from stackctl.values.history import AuditEntry

_MOST_BYTES = 2**20
_KEEP = 2000


def record(state: Path, entry: AuditEntry) -> None:
    """Add an entry. Raises StackctlError when it cannot be stored (the disk is full)."""
    message = lines.shortened(entry.message)
    if message is not None:
        # Messages quote other programs; a key must not get here whatever they say.
        message = keys.hidden(message)
    entry = msgspec.structs.replace(entry, message=message)
    lines.append(state / "audit.jsonl", entry, most_bytes=_MOST_BYTES, keep=_KEEP)


def read(state: Path) -> tuple[AuditEntry, ...]:
    """All entries, oldest first. Raises StackctlError when the log is not ours to read."""
    found = lines.newest_first(state / "audit.jsonl", AuditEntry, most_bytes=_MOST_BYTES)
    return tuple(reversed(tuple(found)))


def user() -> str:
    """Who runs this: the login name of the real user, and who became it by sudo or pkexec, as in
    ``root (alice)``."""
    name = _login(os.getuid())
    behind = os.environ.get("SUDO_USER") or ""
    caller = os.environ.get("PKEXEC_UID") or ""
    if not behind and re.fullmatch("[0-9]{1,9}", caller):
        behind = _login(int(caller))
    # Anybody can set these variables for themselves: a name it must be at least.
    known = re.fullmatch(r"[\w.@\\+-]{1,64}\$?", behind) is not None and behind != name
    return f"{name} ({behind})" if known else name


def _login(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)
