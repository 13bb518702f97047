"""File locks: one writer for each scope. A lock ends with its process and leaves no file behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security

#: The most bytes that are read of a lock's file: one line with its holder, purpose and start.
_MOST_BYTES = 200


@contextlib.contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock while the block runs.

    The kernel drops the lock when the process ends, for any reason. The file is removed at release.
    A process that had opened it before finds another file, or none, at ``path`` and opens that one.

    Raises:
        StackctlError: another process holds the lock (exit 7); the message has its process id, its
            purpose and its start in local time. Or the file cannot be created or locked (exit 6).
    """
    while True:
        descriptor = _open(path)
        if not _flock(descriptor, path, ExitCode.HOST):
            holder = os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise StackctlError(
                f"another stackctl is at work here: {holder or 'just starting'}",
                hint="wait until it is done, then try again",
                exit_code=ExitCode.LOCKED,
            )
        if is_current(descriptor, path):
            break
        os.close(descriptor)
    try:
        _write(descriptor, f"{_mine()}{purpose}, since {time.strftime('%H:%M:%S')}\n")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def mark_waiting(path: Path) -> Iterator[None]:
    """Note in the lock's file that its holder waits for the user's answer, while the block runs.

    Nothing is noted if this process does not hold the lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield
        return
    try:
        text = os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace")
        ours = text.startswith(_mine())
        if ours:
            _write(descriptor, f"{text.strip()}, waiting for an answer\n")
        yield
        if ours:
            _write(descriptor, text)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock a file that is never removed, as the hub's own tools do.

    Returns:
        The descriptor, or None if another process holds the lock. The lock ends when the descriptor
        is closed or the process ends.

    Raises:
        StackctlError: the file cannot be created or locked, or is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StackctlError(f"cannot create the lock {path}: {error.strerror}") from None
    if _flock(descriptor, path, ExitCode.FAILED):
        return descriptor
    os.close(descriptor)
    return None


def lock_holder(path: Path) -> str | None:
    """Return the lock's text (holder, purpose, start), or None if no process holds the lock.

    The kernel could be asked only by taking the lock for a moment, which would turn away a writer
    that comes just then. So the text is believed if the process that it names has the file open.
    """
    try:
        text = path.read_text("utf-8", "replace").strip()
        match = re.match(r"process (\d+),", text)
        opened = Path(f"/proc/{match[1]}/fd").iterdir() if match else ()
        return text if any(_leads_to(link, path) for link in opened) else None
    except OSError:
        return None


def record_lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds a POSIX lock on a file, as apt and dpkg do.

    None if no process holds one, or if the file cannot be opened for writing. 0 if the process is
    in another PID namespace, such as a container's (fcntl(2)).
    """
    # struct flock of Linux on 64 bits: type, whence, start, length, process.
    asked = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("rb+") as stream:
            said = fcntl.fcntl(stream, fcntl.F_GETLK, asked)
    except OSError:
        return None
    kind, _, _, _, pid = struct.unpack("@hhqqi", said)
    return None if kind == fcntl.F_UNLCK else int(pid)


def _mine() -> str:
    return f"process {os.getpid()}, "


def _write(descriptor: int, text: str) -> None:
    # The text only informs other processes: the lock holds without it.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _leads_to(link: Path, path: Path) -> bool:
    try:
        return link.samefile(path)
    except OSError:
        return False


def _open(path: Path) -> int:
    try:
        # Other users could take the lock if they could open the file.
        path_security.make_private_folder(path.parent)
    except StackctlError as error:
        error.exit_code = ExitCode.HOST
        raise
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StackctlError(
            f"cannot create the lock {path}: {error.strerror}", exit_code=ExitCode.HOST
        ) from None


def _flock(descriptor: int, path: Path, exit_code: ExitCode) -> bool:
    """Lock an open file. Return False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        raise StackctlError(f"cannot lock {path}: {error.strerror}", exit_code=exit_code) from None
    return True


def is_current(descriptor: int, path: Path) -> bool:
    """Return True if a path still leads to an open file, so that a lock on it counts."""
    try:
        at_path = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), at_path)
