"""A file that is downloaded: ``NAME.part``, and its state in ``NAME.part.state``.

The file is divided into pieces. For each piece the state has the number of its first bytes that are
written, and their CRC-32. The state is written after the bytes, so a killed process leaves a state
that is right or behind, never ahead. After a power loss the state may be ahead. So pieces of an
earlier run are compared with their CRC before they count.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.files import sync_folder
from stackctl.values.base import Value

#: Large, so that requests cost little; small, so that four pieces arrive at about the same time.
PIECE_BYTES = 32 << 20
_HEADER_BYTES = 4096
_ENTRY = struct.Struct("<II")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class _Header(Value, frozen=True, kw_only=True):
    """The first line of the state, which identifies the file. ``etag`` is the server's."""

    schema: Literal["stackctl.part/1"] = "stackctl.part/1"
    bytes: int
    piece: int
    etag: str | None = None


class PartialFile:
    """One open ``.part`` file of a known size in bytes. Threads may write different pieces.

    Attributes:
        size: bytes of the whole file.
        done: number of bytes on the disk, for each piece.
        old: pieces with bytes of an earlier run, which are not compared with their CRC yet.
        etag: the server's ETag or date of the file that the pieces come from (None: unknown).
    """

    def __init__(self, target: Path, size: int) -> None:
        self.path = target.with_name(target.name + ".part")
        self.state_path = target.with_name(target.name + ".part.state")
        self.size = size
        self.count = max(1, -(-size // PIECE_BYTES))
        self.done = [0] * self.count
        self.crc = [0] * self.count
        self.old: set[int] = set()
        self.etag: str | None = None
        self._lock = threading.Lock()
        self._fd = self._state = -1
        try:
            self._fd = _open(self.path)
            self._state = _open(self.state_path)
            if not self._read_state():
                self.reset()
        except OSError as error:
            self.close()
            raise write_error(self.path, error) from None
        except BaseException:
            self.close()
            raise

    def _read_state(self) -> bool:
        """Load the state of an earlier run. Return False if it is absent or of another file."""
        raw = os.pread(self._state, _HEADER_BYTES, 0)
        try:
            header = msgspec.json.decode(raw.partition(b"\n")[0], type=_Header)
        except (msgspec.DecodeError, ValueError):
            return False
        table = os.pread(self._state, _ENTRY.size * self.count, _HEADER_BYTES)
        same = (header.bytes, header.piece) == (self.size, PIECE_BYTES)
        if not same or len(table) != _ENTRY.size * self.count:
            return False
        if os.fstat(self._fd).st_size != self.size:
            return False
        for number, (done, crc) in enumerate(_ENTRY.iter_unpack(table)):
            if 0 < done <= self.length(number):
                self.done[number], self.crc[number] = done, crc
                self.old.add(number)
        self.etag = header.etag
        return True

    def reset(self) -> None:
        """Discard all bytes and restart."""
        with self._lock:
            self.done, self.crc, self.old = [0] * self.count, [0] * self.count, set()
            self.etag = None
            try:
                os.ftruncate(self._state, 0)
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, self.size)
                self._write_header()
                os.ftruncate(self._state, _HEADER_BYTES + _ENTRY.size * self.count)
            except OSError as error:
                raise write_error(self.path, error) from None

    def set_etag(self, etag: str) -> None:
        """Store the server's ETag or date of the file."""
        with self._lock:
            if self.etag != etag:
                self.etag = etag
                self._write_header()

    def _write_header(self) -> None:
        header = _Header(bytes=self.size, piece=PIECE_BYTES, etag=self.etag)
        os.pwrite(self._state, (msgspec.json.encode(header) + b"\n").ljust(_HEADER_BYTES), 0)

    def length(self, piece: int) -> int:
        """Return the full size of a piece in bytes."""
        return min(PIECE_BYTES, self.size - piece * PIECE_BYTES)

    def complete(self, piece: int) -> bool:
        """Return True if all bytes of a piece are on the disk."""
        return self.done[piece] == self.length(piece)

    @property
    def bytes_present(self) -> int:
        """Return the number of bytes on the disk."""
        return sum(self.done)

    def write(self, piece: int, view: memoryview) -> None:
        """Append bytes to a piece. Raises StackctlError if the disk is full or fails."""
        at = piece * PIECE_BYTES + self.done[piece]
        crc = zlib.crc32(view, self.crc[piece])
        try:
            left = view
            while left:
                written = os.pwrite(self._fd, left, at)
                left, at = left[written:], at + written
            self._enter(piece, self.done[piece] + len(view), crc)
        except OSError as error:
            raise write_error(self.path, error) from None

    def start_writeback(self, piece: int) -> None:
        """Start to write a piece to the disk, without waiting.

        Otherwise the kernel may write a large file only at its end, which then takes minutes.
        """
        with contextlib.suppress(OSError):
            at, length = piece * PIECE_BYTES, self.length(piece)
            # For dirty pages the kernel starts to write them and drops none.
            os.posix_fadvise(self._fd, at, length, os.POSIX_FADV_DONTNEED)

    def _enter(self, piece: int, done: int, crc: int) -> None:
        with self._lock:
            os.pwrite(self._state, _ENTRY.pack(done, crc), _HEADER_BYTES + _ENTRY.size * piece)
            self.done[piece], self.crc[piece] = done, crc

    def discard_piece(self, piece: int) -> None:
        """Discard all bytes of a piece, because they are wrong."""
        self.old.discard(piece)
        try:
            self._enter(piece, 0, 0)
        except OSError as error:
            raise write_error(self.path, error) from None

    def verify_piece(self, piece: int, view: memoryview) -> bool:
        """Return True if a piece matches its CRC; it then no longer counts as old."""
        at, end, crc = piece * PIECE_BYTES, piece * PIECE_BYTES + self.done[piece], 0
        while at < end:
            count = self.readinto(view[: min(end - at, len(view))], at)
            if count == 0:
                return False
            crc, at = zlib.crc32(view[:count], crc), at + count
        if crc != self.crc[piece]:
            return False
        self.old.discard(piece)
        return True

    def readinto(self, view: memoryview, at: int) -> int:
        """Read bytes of the file at the offset ``at`` into a buffer; return their number."""
        try:
            count: int = os.preadv(self._fd, [view], at)
        except OSError as error:
            raise StackctlError(f"cannot read {self.path}: {error.strerror}") from None
        return count

    def discard(self) -> None:
        """Remove the part and its state, because another process has stored the complete file."""
        for path in (self.path, self.state_path):
            path.unlink(missing_ok=True)

    def finish(self, target: Path) -> os.stat_result:
        """Sync the file to the disk and rename it to ``target``; return its status."""
        try:
            os.fsync(self._fd)
            os.fchmod(self._fd, 0o644)
            os.replace(self.path, target)  # noqa: PTH105
            sync_folder(target.parent)
            found = os.fstat(self._fd)
            with contextlib.suppress(FileNotFoundError):
                self.state_path.unlink()
        except OSError as error:
            raise write_error(target, error) from None
        return found

    def close(self) -> None:
        """Close the files; they stay on the disk for the next run."""
        for descriptor in (self._fd, self._state):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._state = -1


def bytes_on_disk(target: Path, size: int) -> int:
    """Return the bytes of a file that this or another process has downloaded so far."""
    count = max(1, -(-size // PIECE_BYTES))
    try:
        fd = os.open(f"{target}.part.state", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        table = os.pread(fd, _ENTRY.size * count, _HEADER_BYTES)
    finally:
        os.close(fd)
    if len(table) != _ENTRY.size * count:
        return 0
    there: int = sum(done for done, _ in _ENTRY.iter_unpack(table))
    return min(size, there)


def allocated_bytes(target: Path) -> int:
    """Return the bytes that a part takes on the disk."""
    try:
        return target.with_name(target.name + ".part").lstat().st_blocks * 512
    except OSError:
        return 0


def write_error(path: Path, error: OSError) -> StackctlError:
    """Return the error for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StackctlError(
            f"the disk is full: cannot write {path}",
            hint="the part is kept: free some space, and the same command continues it",
        )
    return StackctlError(f"cannot write {path}: {error.strerror or error}")


def _open(path: Path) -> int:
    descriptor = os.open(path, _FLAGS, 0o600)
    require_single_link(descriptor, path)
    return descriptor


def require_single_link(descriptor: int, path: Path) -> None:
    """Close an open file and raise StackctlError if it is not regular or has a second hard link.

    With a second link it could be another user's file, which must not be overwritten.
    """
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise StackctlError(
            f"{path} is not a file of its own", hint=f"look at it, then remove it: rm {path}"
        )
