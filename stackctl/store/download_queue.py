"""The files of a download, and the state that its threads share: open files and work left."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stackctl.machine import lock
from stackctl.store import partial_file
from stackctl.store.partial_file import PartialFile

CONNECTIONS: Final = 4
POLL_S: Final = 0.2
#: Files that are open at the same time, with three descriptors each; a process has some hundred.
_MOST_OPEN: Final = 64


@dataclass(frozen=True)
class DownloadRequest:
    """A file to download: its name for the user, its URL, and its place on the disk.

    ``size`` is in bytes. The content is verified by ``sha256``, or as a git blob by ``git_sha1``;
    without them only the size is checked. A process that downloads the file locks ``lock``. If
    ``named_by_hash`` is set, the complete file is stored beside ``target``, under its SHA-256.
    """

    name: str
    url: str
    size: int
    target: Path
    lock: Path
    sha256: str | None = None
    git_sha1: str | None = None
    named_by_hash: bool = False

    @property
    def known(self) -> bool:
        """Return True if a hash is known, so that the content can be verified."""
        return self.sha256 is not None or self.git_sha1 is not None


@dataclass(frozen=True)
class DownloadedFile:
    """A complete file. ``mtime_ns`` and ``sha256`` detect later changes.

    ``sha256`` is None if another process has stored the file: then it is not verified.
    """

    request: DownloadRequest
    sha256: str | None
    mtime_ns: int


@dataclass(frozen=True)
class RetryPolicy:
    """The number of retries without progress, and the first and longest pause in seconds.

    Each pause is twice as long as the one before.
    """

    attempts: int = 8
    first_s: float = 1.0
    most_s: float = 60.0


@dataclass(frozen=True)
class DownloadSettings:
    """Settings of a download.

    ``limit`` is in bytes per second of all connections together (None: no limit). A connection may
    be silent for ``timeout_s`` seconds.
    """

    limit: float | None = None
    connections: int = CONNECTIONS
    retries: RetryPolicy = RetryPolicy()
    timeout_s: float = 30


DEFAULT_SETTINGS: Final = DownloadSettings()


@dataclass(eq=False)
class FileDownload:
    """One file that is downloaded. The board's condition guards all but the bytes of ``part``.

    ``pending`` are the missing pieces that no connection fetches, ``flying`` is the number of
    pieces that are fetched now. ``whole``: the server sends whole files only, so one connection is
    used. ``fresh``: the download must restart as soon as no connection writes. ``again``: it was
    restarted, so the hash of earlier bytes is void. ``address`` is the URL that the hub has
    redirected to, and ``turn`` counts how often it was discarded: refusals of several connections
    in the same turn count once.
    """

    request: DownloadRequest
    part: PartialFile
    descriptor: int
    pending: deque[int] = field(default_factory=deque)
    flying: int = 0
    address: str | None = None
    addresses: int = 0
    turn: int = 0
    failures: int = 0
    not_before: float = 0.0
    whole: bool = False
    fresh: bool = False
    again: bool = False
    restarts: int = 0

    def requeue_missing(self) -> None:
        """Set ``pending`` to all incomplete pieces. Call it when no connection fetches the file."""
        part = self.part
        self.pending = deque(n for n in range(part.count) if not part.complete(n))


class DownloadQueue:
    """The work of a download, guarded by ``changed``, which is notified of every change.

    Attributes:
        stop: set when the threads must end.
        left: number of files that are not complete.
        here: bytes on the disk, of files that were begun.
        came: bytes that were received in this run.
        note: the reason for waiting, for the user (None: no wait).
    """

    def __init__(self, files: Sequence[DownloadRequest]) -> None:
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.left = len(files)
        self.got: list[DownloadedFile] = []
        self.here = 0
        self.came = 0
        self.note: str | None = None
        self.error: BaseException | None = None
        self.hashing: deque[FileDownload] = deque()
        self._waiting = deque(files)
        self._busy: deque[DownloadRequest] = deque()
        self._active: list[FileDownload] = []

    def run_guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; store its exception and end the download."""
        try:
            work()
        except BaseException as error:  # download_files() raises it
            with self.changed:
                self.error = self.error or error
                self.stop_all()

    def stop_all(self) -> None:
        """Signal all threads to end."""
        self.stop.set()
        with self.changed:
            self.changed.notify_all()

    def next_piece(self) -> tuple[FileDownload, int] | None:
        """Wait for a piece to fetch; return its job and number, or None if nothing is left."""
        with self.changed:
            while not self.stop.is_set() and self.left:
                now = time.monotonic()
                for job in self._active:
                    if now < job.not_before or (job.flying and (job.whole or job.fresh)):
                        continue
                    if job.fresh:
                        self._begin_anew(job)
                    if job.pending:
                        job.flying += 1
                        return job, job.pending.popleft()
                full = len(self._active) >= _MOST_OPEN
                if full or not self._waiting or not self._open(self._waiting.popleft()):
                    self.changed.wait(POLL_S)
        return None

    def _begin_anew(self, job: FileDownload) -> None:
        job.fresh = False
        self.here -= job.part.bytes_present
        job.part.reset()
        job.requeue_missing()
        job.again = True
        self.changed.notify_all()

    def _open(self, request: DownloadRequest) -> bool:
        """Begin a file. Return False if another process downloads it."""
        descriptor = lock.try_lock(request.lock)
        if descriptor is None:
            self._busy.append(request)
            self.note = f"another download has {request.name}"
            return False
        self.note = None
        try:
            if (got := existing(request)) is not None:
                # Another process has completed it meanwhile.
                os.close(descriptor)
                self.here += request.size
                self._done(got)
                return True
            part = PartialFile(request.target, request.size)
            if part.bytes_present and part.etag is None and not request.known:
                part.reset()  # a change on the server could not be detected
        except BaseException:
            os.close(descriptor)
            raise
        job = FileDownload(request, part, descriptor)
        job.requeue_missing()
        self.here += part.bytes_present
        self._active.append(job)
        self.hashing.append(job)
        self.changed.notify_all()
        return True

    def retry_locked(self) -> None:
        """Try the files again that another process had locked: it may have completed them."""
        with self.changed:
            if self._busy:
                self._waiting.extend(self._busy)
                self._busy.clear()
                self.changed.notify_all()

    def bytes_present(self) -> int:
        """Return the bytes on the disk, including files that other processes download."""
        with self.changed:
            others = [*self._busy, *self._waiting] if self.note else []
            return self.here + sum(
                partial_file.bytes_on_disk(file.target, file.size) for file in others
            )

    def finish(self, job: FileDownload, got: DownloadedFile) -> None:
        """Record that a file is complete and in its place, and close its job."""
        with self.changed:
            self.hashing.remove(job)
            self._active.remove(job)
            _release(job)
            self._done(got)

    def _done(self, got: DownloadedFile) -> None:
        self.got.append(got)
        self.left -= 1
        self.changed.notify_all()

    def close(self) -> None:
        """Close the open files after the threads have ended; the files stay for the next run."""
        for job in self._active:
            _release(job)
        self._active.clear()


def _release(job: FileDownload) -> None:
    job.part.close()
    with contextlib.suppress(OSError):
        os.close(job.descriptor)


def existing(request: DownloadRequest) -> DownloadedFile | None:
    """Return a file of the right size that is in its place, not verified; None if there is none."""
    try:
        found = request.target.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size != request.size:
        return None
    return DownloadedFile(request, None, found.st_mtime_ns)
