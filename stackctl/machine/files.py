"""Files and folders: written atomically, appended to, read line by line, measured and removed.

Nothing here follows another user's link or waits for a pipe. No reader sees half of a file that is
written, even after a power loss.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.path_security import make_private_folder, reject_foreign_symlink

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: The unit of st_blocks in stat(2).
_BLOCK_BYTES = 512
#: A longer line is split into several.
_MOST_LINE_BYTES = 64 * 2**10
_COLOR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


def write_atomically(
    path: Path, text: str, *, mode: int = 0o644, keep_folder: bool = False
) -> None:
    """Write a file so that readers see the old text or the new one, also after a power loss.

    The temporary file is a dotfile without a unit suffix, so neither systemd nor Quadlet loads it.
    If ``mode`` gives no rights to group and others, the folder becomes private, too (0700). Set
    ``keep_folder`` to leave the mode of the folder as it is.

    Raises:
        StackctlError: the file cannot be written (disk full, no permission); nothing is left
            behind. Exit 2 if the path goes through a link of another user.
    """
    reject_foreign_symlink(path.parent)
    temporary = None
    try:
        if mode & 0o077 or keep_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            make_private_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(
            prefix=".stackctl-", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StackctlError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108


def remove_file(path: Path) -> bool:
    """Remove a file so that it stays removed after a power loss.

    Returns:
        True if the file existed.

    Raises:
        StackctlError: the file cannot be removed.
    """
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StackctlError(f"cannot remove {path}: {error.strerror or error}") from None
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, or of stdin for ``-``, without colour codes.

    Bytes that are not UTF-8 are replaced. Raises StackctlError (exit 2) if the file cannot be read.
    """
    try:
        with os.fdopen(os.dup(0), "rb") if path == "-" else Path(path).open("rb") as stream:
            while raw := stream.readline(_MOST_LINE_BYTES):
                text = raw.decode("utf-8", "replace").rstrip("\r\n")
                yield _COLOR.sub("", text) if "\x1b" in text else text
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StackctlError(
            f"cannot read {'stdin' if path == '-' else path}: {why}", exit_code=ExitCode.USAGE
        ) from None


def folder_sizes(above: Path) -> dict[str, int]:
    """Return the bytes on the disk of each folder in a folder, by name; links are not followed.

    Empty if ``above`` does not exist.
    """
    found = {}
    with contextlib.suppress(OSError), _opened(above) as descriptor:
        for entry in sorted(os.listdir(descriptor)):  # noqa: PTH208 - by descriptor
            with contextlib.suppress(OSError):
                os.close(os.open(entry, _FOLDER, dir_fd=descriptor))
                found[entry] = _bytes(entry, descriptor)
    return found


def remove_subfolder(above: Path, name: str) -> None:
    """Remove a folder in a folder, with its content. Raises StackctlError if that fails."""
    try:
        with _opened(above) as descriptor:
            # By descriptors at every level, so that no program can replace a folder by a link.
            shutil.rmtree(name, dir_fd=descriptor)
    except OSError as error:
        raise StackctlError(
            f"cannot remove {above / name}: {error.strerror or error}",
            hint=f"podman unshare rm -rf {above / name}" if os.geteuid() else None,
        ) from None


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _bytes(name: str, above: int) -> int:
    total = 0
    for _, folders, files, descriptor in os.fwalk(name, follow_symlinks=False, dir_fd=above):
        for entry in (*folders, *files):
            with contextlib.suppress(OSError):
                seen = os.stat(entry, dir_fd=descriptor, follow_symlinks=False)
                total += seen.st_blocks * _BLOCK_BYTES
    return total
