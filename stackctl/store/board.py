"""What the threads of a download share: the files that are on their way, and what is left to do."""

from __future__ import annotations

import contextlib
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from stackctl.machine import lock
from stackctl.store import part as parts
from stackctl.store.part import Part
from stackctl.store.wanted import Got, Wanted

POLL_S: Final = 0.2
#: Files that are open at the same time, three descriptors each: a process has some hundred.
_MOST_OPEN: Final = 64


@dataclass(eq=False)
class Job:
    """One file on its way; all but ``part``'s bytes are guarded by the board's condition.

    ``pending`` are the pieces that no connection is at, ``flying`` counts those that one is.
    ``whole``: the server sends whole files only, so one connection does it. ``fresh``: begin anew
    once nobody writes any more; ``again``: it was begun anew, and what was hashed does not count.
    ``address`` is where the hub has redirected to, ``turn`` how often it was given up: what several
    connections are refused in the same turn counts once.
    """

    wanted: Wanted
    part: Part
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

    def rest(self) -> None:
        """Have all that is missing fetched; nobody is at it."""
        part = self.part
        self.pending = deque(n for n in range(part.count) if not part.complete(n))


class Board:
    """Guarded by ``changed``, which is notified of everything that somebody may wait for.

    Attributes:
        stop: set when the threads are to end.
        left: files that are not yet there.
        here: bytes that are there, of files that were begun.
        came: bytes that came in this run.
        note: what it waits for, for people.
    """

    def __init__(self, files: Sequence[Wanted]) -> None:
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.left = len(files)
        self.got: list[Got] = []
        self.here = 0
        self.came = 0
        self.note: str | None = None
        self.error: BaseException | None = None
        self.hashing: deque[Job] = deque()
        self._waiting = deque(files)
        self._busy: deque[Wanted] = deque()
        self._active: list[Job] = []

    def guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; what goes wrong there ends the download."""
        try:
            work()
        except BaseException as error:  # passed on by the thread that waits
            with self.changed:
                self.error = self.error or error
                self.end()

    def end(self) -> None:
        """Have all threads end."""
        self.stop.set()
        with self.changed:
            self.changed.notify_all()

    def next(self) -> tuple[Job, int] | None:
        """A job and one of its pieces, waited for; None when there is nothing left to do."""
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

    def _begin_anew(self, job: Job) -> None:
        job.fresh = False
        self.here -= job.part.here
        job.part.reset()
        job.rest()
        job.again = True
        self.changed.notify_all()

    def _open(self, wanted: Wanted) -> bool:
        """Begin a file, if no other process has it."""
        descriptor = lock.try_file(wanted.lock)
        if descriptor is None:
            self._busy.append(wanted)
            self.note = f"another download has {wanted.name}"
            return False
        self.note = None
        try:
            if (got := existing(wanted)) is not None:
                # Another download has brought it meanwhile.
                lock.release(descriptor)
                self.here += wanted.size
                self._done(got)
                return True
            part = Part(wanted.target, wanted.size)
            if part.here and part.etag is None and not wanted.known:
                part.reset()  # nothing would tell whether the rest is of the same file
        except BaseException:
            lock.release(descriptor)
            raise
        job = Job(wanted, part, descriptor)
        job.rest()
        self.here += part.here
        self._active.append(job)
        self.hashing.append(job)
        self.changed.notify_all()
        return True

    def look_again(self) -> None:
        """Consider the files that another process had: it may be done with them."""
        with self.changed:
            if self._busy:
                self._waiting.extend(self._busy)
                self._busy.clear()
                self.changed.notify_all()

    def seen(self) -> int:
        """Bytes that are there, also of files that other downloads are at."""
        with self.changed:
            others = [*self._busy, *self._waiting] if self.note else []
            return self.here + sum(parts.bytes_there(file.target, file.size) for file in others)

    def finish(self, job: Job, got: Got) -> None:
        """A file is in its place."""
        with self.changed:
            self.hashing.remove(job)
            self._active.remove(job)
            _release(job)
            self._done(got)

    def _done(self, got: Got) -> None:
        self.got.append(got)
        self.left -= 1
        self.changed.notify_all()

    def close(self) -> None:
        """Close what is open, once the threads have ended; it stays for the next run."""
        for job in self._active:
            _release(job)
        self._active.clear()


def _release(job: Job) -> None:
    job.part.close()
    with contextlib.suppress(OSError):
        lock.release(job.descriptor)


def existing(wanted: Wanted) -> Got | None:
    """Return a file that is in its place already, whatever it holds; None if there is none."""
    try:
        found = wanted.target.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size != wanted.size:
        return None
    return Got(wanted, None, found.st_mtime_ns)
