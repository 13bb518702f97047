"""API keys of stacks: ``STATE/keys/STACK``, one a line, newest first, private to their owner."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import read_private, remove_file, write_atomically

_PREFIX = "sk-stackctl-"
_MOST_BYTES = 64 * 2**10
#: The characters that RFC 6750 (section 2.1) allows after "Bearer ", in an unguessable length.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]{16,512}={0,2}")


def path(state: Path, stack: str) -> Path:
    """Return the path of the keys of a stack."""
    return state / "keys" / stack


def read(state: Path, stack: str) -> tuple[str, ...]:
    """Return the valid keys, newest first; none when there is no file.

    Raises:
        StackctlError: the file is a link, is readable by or belongs to others, or holds a
            line that is not a key (the message does not show it).
    """
    file = path(state, stack)
    raw = read_private(file, _MOST_BYTES, secret=True)
    if raw is None:
        return ()
    found = tuple(line for line in raw.decode("utf-8", "replace").split("\n") if line)
    for number, line in enumerate(found, 1):
        if _KEY.fullmatch(line) is None:
            raise StackctlError(
                f"line {number} of {file} is not a key",
                hint=f"16 letters or more without spaces; or stackctl key remove {stack}",
            )
    return found


def create(state: Path, stack: str) -> tuple[str, ...]:
    """Create the first key of a stack and return the valid keys.

    Raises:
        StackctlError: the stack has a key already (exit 5), or it cannot be stored.
    """
    if read(state, stack):
        raise StackctlError(
            f"{stack} has a key already",
            hint=f"stackctl key rotate {stack} makes a new one",
            exit_code=ExitCode.REFUSED,
        )
    return _write(state, stack, (_new(),))


def rotate(state: Path, stack: str, *, keep: bool) -> tuple[str, ...]:
    """Create a new key. With ``keep`` the previous one stays valid until the next rotation.

    Return the valid keys, newest first.

    Raises:
        StackctlError: the stack has no key (exit 4), or the new one cannot be stored: the old
            ones then stay.
    """
    before = require(state, stack)
    return _write(state, stack, (_new(), *before[:1]) if keep else (_new(),))


def require(state: Path, stack: str) -> tuple[str, ...]:
    """Return the keys of a stack. Raise StackctlError (exit 4) when it has none; else as read."""
    found = read(state, stack)
    if not found:
        raise StackctlError(
            f"{stack} has no key", hint=f"stackctl key create {stack}", exit_code=ExitCode.NOT_FOUND
        )
    return found


def remove_keys(state: Path, stack: str) -> bool:
    """Delete the key file of a stack without reading it; return True when there was one."""
    return remove_file(path(state, stack))


def redact_keys(text: str) -> str:
    """Return a text with the keys that stackctl creates redacted."""
    return re.sub(rf"{_PREFIX}[\w-]+", f"{_PREFIX}...", text)


def _new() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def _write(state: Path, stack: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    file = path(state, stack)
    write_atomically(file, "".join(f"{key}\n" for key in keys), mode=0o600)
    return keys
