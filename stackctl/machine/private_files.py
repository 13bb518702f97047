"""Files that only this user may read and write: logs that only grow, and secrets.

Nothing here follows a symbolic link, reads a file of another user, or waits for a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.atomic_files import sync_folder, write_atomically
from stackctl.machine.path_security import make_private_folder

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def append_line(path: Path, line: bytes, *, most_bytes: int, keep: int) -> None:
    """Append a line to a log of this user (0600) in one write, and sync it to the disk.

    A log that has grown over ``most_bytes`` is cut to its last ``keep`` lines, or to the last lines
    that fill half of ``most_bytes`` if they are fewer. A line cut off by a crash is not repaired.

    Raises:
        StackctlError: the disk is full, or the file is not this user's. Then no part of the line
            stays in the file.
    """
    make_private_folder(path.parent)
    try:
        descriptor = _open_locked(path)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                if os.write(descriptor, line + b"\n") != len(line) + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            if size == 0:
                sync_folder(path.parent)
            if size + len(line) > most_bytes:
                # The line is written. If the disk is too full for a new log, the next call cuts.
                with contextlib.suppress(StackctlError):
                    _cut(path, descriptor, most_bytes, keep)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failed("write", path, error) from None


def read_private(path: Path, most_bytes: int, *, secret: bool = False) -> bytes | None:
    """Return the last ``most_bytes`` bytes of a file of this user, or None if it does not exist.

    Raises:
        StackctlError: the path is a link or not a file, the file belongs to another user, or
            ``secret`` is set and other users may read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed("read", path, error) from None
    try:
        seen = _require_own(descriptor, path)
        if secret and seen.st_mode & 0o077:
            raise _refused(path, "may be read by other users", f"chmod 600 {path}")
        return os.pread(descriptor, most_bytes, max(0, seen.st_size - most_bytes))
    except OSError as error:
        raise _failed("read", path, error) from None
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Return the descriptor of the locked log.

    A process that cuts the log puts a new file in its place, so the path is compared after locking.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _OPEN, 0o600)
        try:
            seen = _require_own(descriptor, path)
            if seen.st_mode & 0o077:
                os.fchmod(descriptor, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _cut(path: Path, descriptor: int, most_bytes: int, keep: int) -> None:
    size = os.fstat(descriptor).st_size
    half = most_bytes // 2
    tail = os.pread(descriptor, half, max(0, size - half))
    # The first line of the tail may be incomplete.
    lines = tail.decode("utf-8", "replace").split("\n")[1:-1]
    write_atomically(path, "".join(line + "\n" for line in lines[-keep:]), mode=0o600)


def _require_own(descriptor: int, path: Path) -> os.stat_result:
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode):
        raise _refused(path, "is not a file")
    if seen.st_uid != os.geteuid():
        raise _refused(path, "belongs to another user")
    return seen


def _refused(path: Path, why: str, hint: str | None = None) -> StackctlError:
    return StackctlError(f"{path} {why}", hint=hint or f"look at it, then remove it: rm {path}")


def _failed(what: str, path: Path, error: OSError) -> StackctlError:
    if error.errno == errno.ELOOP:
        return _refused(path, "is a symbolic link, which is not followed")
    return StackctlError(f"cannot {what} {path}: {error.strerror}")
