"""Download files over several connections at once, and resume earlier downloads.

Each connection fetches one piece after another, in order, of the first file that lacks pieces. One
thread hashes the bytes soon after their arrival, from the page cache, so that a file is verified a
moment after its last byte. partial_file.py stores the state between runs.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, NoReturn

from stackctl.errors import StackctlError
from stackctl.machine.http_download import ConnectionLost, Response, Transfer, host_of
from stackctl.store.download_queue import (
    DEFAULT_SETTINGS,
    POLL_S,
    DownloadedFile,
    DownloadQueue,
    DownloadRequest,
    DownloadSettings,
    FileDownload,
    existing,
)
from stackctl.store.download_rate import (
    ProgressCallback,
    ProgressMeter,
    RateLimiter,
    no_progress,
)
from stackctl.store.hub import check_range, check_redirect, retry_after, status_error
from stackctl.store.partial_file import PIECE_BYTES

#: Bytes of one read. A killed process loses up to one read for each connection, so reads are small
#: on a slow line, and larger if they take no time.
_LEAST_BYTES: Final = 64 << 10
_MOST_BYTES: Final = 1 << 20
_SOON_S: Final = 0.002
_LATE_S: Final = 0.010
#: How often the hub is asked for a new address if the one that it redirects to is refused and no
#: bytes arrive in between.
_MOST_ADDRESSES: Final = 3
#: How often a download restarts because the server has another file.
_MOST_RESTARTS: Final = 2
#: Valid ETags and dates of a server; any others are neither stored nor sent back.
_ETAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,200}"')
_DATE: Final = re.compile(r"[A-Za-z0-9 ,:+-]{1,60}")
_READ_BYTES: Final = 1 << 20
#: A file that is damaged once is fetched again; damaged twice, it is an error.
_MOST_DAMAGED: Final = 2


def download_files(
    files: Sequence[DownloadRequest],
    settings: DownloadSettings = DEFAULT_SETTINGS,
    *,
    secret: str | None = None,
    tell: ProgressCallback = no_progress,
) -> list[DownloadedFile]:
    """Download files. Only complete, verified files get their name; parts stay for the next run.

    Args:
        files: no two with the same target.
        settings: speed, connections and retries.
        secret: a token for the servers of their URLs; no other server gets it.
        tell: called with the progress a few times a second, in the caller's thread.

    Raises:
        StackctlError: a file cannot be fetched or verified; the message names it.
    """
    queue = DownloadQueue(files)
    meter = ProgressMeter(sum(file.size for file in files), tell)
    limiter = RateLimiter(settings.limit)
    connections = [
        _Connection(queue, settings, secret, limiter) for _ in range(max(1, settings.connections))
    ]
    work: list[Callable[[], None]] = [connection.run for connection in connections]
    work.append(lambda: _hash_files(queue))
    threads = [threading.Thread(target=queue.run_guarded, args=(one,)) for one in work]
    try:
        for thread in threads:
            thread.start()
        while queue.left and queue.error is None:
            with queue.changed:
                queue.changed.wait(POLL_S)
            queue.retry_locked()
            meter.report(queue.bytes_present(), queue.came, note=queue.note)
    finally:
        queue.stop_all()
        for connection in connections:
            connection.transfer.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        queue.close()
    if queue.error is not None:
        raise queue.error
    return queue.got


class _Connection:
    """Fetches the pieces of a queue. ``secret`` goes only to the server of a file's URL."""

    def __init__(
        self,
        queue: DownloadQueue,
        settings: DownloadSettings,
        secret: str | None,
        limiter: RateLimiter,
    ) -> None:
        self.transfer = Transfer(timeout_s=settings.timeout_s)
        self._queue = queue
        self._secret = secret
        self._limiter = limiter
        self._retries = settings.retries
        self._view = memoryview(bytearray(_MOST_BYTES))
        self._step = _LEAST_BYTES

    def run(self) -> None:
        """Fetch pieces until none is left."""
        with self.transfer:
            while (task := self._queue.next_piece()) is not None:
                self._try(*task)

    def _try(self, job: FileDownload, piece: int) -> None:
        queue, before, begun = self._queue, job.part.done[piece], time.monotonic()
        lost: ConnectionLost | None = None
        wait: float | None = None
        try:
            wait = self._receive(job, piece)
        except ConnectionLost as error:
            lost = error
        with queue.changed:
            job.flying -= 1
            if job.whole and not job.flying:
                job.requeue_missing()
            elif not job.part.complete(piece) and not job.whole:
                job.pending.appendleft(piece)
            if queue.stop.is_set():
                return
            if lost is not None or wait is not None:
                if job.part.done[piece] > before:
                    job.failures = job.addresses = 0
                # A failure of all connections at the same time counts once.
                if begun >= job.not_before:
                    job.failures += 1
                    if job.failures > self._retries.attempts:
                        self._give_up(job, lost)
                    job.not_before = time.monotonic() + self._pause(job.failures, wait)
                elif wait:
                    job.not_before = max(job.not_before, time.monotonic() + wait)
                if lost is not None:
                    queue.note = f"{lost.message}: once more"
            elif job.part.complete(piece):
                job.failures = job.addresses = 0
                queue.note = None
            queue.changed.notify_all()

    def _pause(self, failures: int, wanted: float | None) -> float:
        """Return the seconds until the next attempt, at least the ``wanted`` ones of the server."""
        pause = min(self._retries.most_s, self._retries.first_s * 2.0 ** (failures - 1))
        return max(wanted or 0.0, pause * random.uniform(0.5, 1.0))

    def _give_up(self, job: FileDownload, lost: ConnectionLost | None) -> NoReturn:
        why = lost.message if lost else f"{host_of(job.request.url)} stays busy"
        raise StackctlError(
            f"{job.request.name}: {why}, {self._retries.attempts + 1} times in a row",
            hint="the part is kept: the same command continues it",
        )

    def _receive(self, job: FileDownload, piece: int) -> float | None:
        """Request the missing bytes of a piece and write them.

        Returns:
            None, or, if no bytes were sent, the seconds to wait before the next attempt.
        """
        part, request = job.part, job.request
        first = piece * PIECE_BYTES + part.done[piece]
        last = piece * PIECE_BYTES + part.length(piece) - 1
        address, turn = job.address, job.turn
        headers = {"Range": f"bytes={first}-{last}"}
        # If-Range must not have a weak ETag (RFC 9110, 13.1.5).
        known = part.etag
        if known is not None and not known.startswith("W/"):
            headers["If-Range"] = known
        response = self.transfer.get(
            address or request.url,
            headers,
            secret=None if address else self._secret,
            seen=lambda answer: check_redirect(request, answer),
        )
        if response.status not in (200, 206):
            return self._other(job, response, turn)
        if address is None and response.url != request.url:
            job.address = response.url
        etag = _named(response)
        # Without a hash a missing ETag counts as a change, because the file cannot be verified.
        changed = known is not None and etag != known and (etag is not None or not request.known)
        if changed and request.sha256 is None:
            return self._anew(job)
        if etag:
            part.set_etag(etag)
        if response.status == 206:
            check_range(request.size, response, first, last)
            self._copy(response, job, piece, last + 1 - first)
        elif changed and "If-Range" in headers:
            # The SHA-256 will prove that it is the same file on another server: keep the bytes.
            return 0.0
        else:
            self._all(response, job)
        return None

    def _all(self, response: Response, job: FileDownload) -> None:
        """Write the whole file, because the server ignored the requested range."""
        part, queue = job.part, self._queue
        where = host_of(response.url)
        if response.length not in (None, part.size):
            raise ConnectionLost(f"{where} would send {response.length} of {part.size} bytes")
        with queue.changed:
            job.whole = True
            if job.flying > 1:
                raise ConnectionLost(f"{where} sends whole files only")
            for number in range(part.count):
                queue.here -= part.done[number]
                part.discard_piece(number)
            job.pending.clear()
        for number in range(part.count):
            self._copy(response, job, number, part.length(number))

    def _copy(self, response: Response, job: FileDownload, piece: int, left: int) -> None:
        queue = self._queue
        while left:
            if queue.stop.is_set() or job.fresh:
                return
            begin = time.perf_counter()
            count = response.readinto(self._view[: min(left, self._step)])
            if count == 0:
                raise ConnectionLost(f"{host_of(response.url)} broke the connection off")
            took = time.perf_counter() - begin
            if took > _LATE_S:
                self._step = max(self._step // 2, _LEAST_BYTES)
            elif took < _SOON_S:
                self._step = min(self._step * 2, _MOST_BYTES)
            job.part.write(piece, self._view[:count])
            left -= count
            if left == 0:
                job.part.start_writeback(piece)
            with queue.changed:
                queue.here += count
                queue.came += count
                if left == 0:
                    queue.changed.notify_all()
            self._limiter.take(count, queue.stop)

    def _other(self, job: FileDownload, response: Response, turn: int) -> float:
        """Return the seconds until the next attempt after another status, or raise its error."""
        status = response.status
        if status in (408, 425, 429) or status >= 500:
            self._queue.note = f"{host_of(response.url)} is busy ({status})"
            return retry_after(response.header("Retry-After"))
        away = response.url != job.request.url
        if away and status in (400, 401, 403, 404, 410) and job.addresses < _MOST_ADDRESSES:
            # Signed URLs expire after about an hour, for all connections.
            with self._queue.changed:
                if job.turn == turn:
                    job.address, job.addresses, job.turn = None, job.addresses + 1, turn + 1
            return 0.0
        if status == 416:
            return self._anew(job)
        raise status_error(job.request.name, response)

    def _anew(self, job: FileDownload) -> float:
        """Restart the file, because the server has another one; return the seconds to wait (0)."""
        with self._queue.changed:
            if not job.fresh:
                job.fresh = True
                job.restarts += 1
            if job.restarts > _MOST_RESTARTS:
                raise StackctlError(
                    f"{job.request.name} changes while it is fetched", hint="try again later"
                )
        return 0.0


def _named(response: Response) -> str | None:
    """Return the ETag of the server's file, else its Last-Modified; None if both are invalid."""
    etag, date = response.header("ETag") or "", response.header("Last-Modified") or ""
    if _ETAG.fullmatch(etag):
        return etag
    return date if _DATE.fullmatch(date) else None


def _hash_files(queue: DownloadQueue) -> None:
    """Hash one file after another until all are complete, and move each to its place."""
    view = memoryview(bytearray(_READ_BYTES))
    while True:
        with queue.changed:
            while not queue.hashing:
                if queue.stop.is_set() or not queue.left:
                    return
                queue.changed.wait(POLL_S)
            job = queue.hashing[0]
        got = _verified(queue, job, view)
        if got is None:
            return
        queue.finish(job, got)


def _verified(queue: DownloadQueue, job: FileDownload, view: memoryview) -> DownloadedFile | None:
    """Hash and check a file to its end; return None if the download stops before.

    A damaged file is fetched once more. Raises StackctlError if it is damaged again.
    """
    request, part, damaged = job.request, job.part, 0
    while True:
        job.again = False
        sha, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % request.size)
        for piece in _pieces(queue, job, view):
            sha.update(piece)
            if request.git_sha1 is not None:
                blob.update(piece)
        if queue.stop.is_set():
            return None
        if job.again:
            continue
        sha256 = sha.hexdigest()
        if _right(request, sha256, blob.hexdigest()):
            if request.named_by_hash:
                target = request.target.with_name(sha256)
                request = replace(request, target=target, sha256=sha256, named_by_hash=False)
                if (other := existing(request)) is not None:
                    # Keep it, because a process may be reading it. The caller checks its hash.
                    part.discard()
                    return other
            return DownloadedFile(request, sha256, part.finish(request.target).st_mtime_ns)
        damaged += 1
        if damaged == _MOST_DAMAGED:
            part.reset()
            raise StackctlError(
                f"{request.name} came damaged, twice: its SHA-256 is {sha256[:16]}..., not "
                f"{(request.sha256 or request.git_sha1 or '')[:16]}...",
                hint="something on the way changes it (a proxy?), or the hub's copy is damaged",
            )
        with queue.changed:
            queue.note = f"{request.name} came damaged: once more"
            job.fresh = True
            queue.changed.notify_all()
            while job.fresh and not queue.stop.is_set():
                queue.changed.wait(POLL_S)


def _right(request: DownloadRequest, sha256: str, git_sha1: str) -> bool:
    if request.sha256 is not None:
        return request.sha256 == sha256
    return request.git_sha1 in (None, git_sha1)


def _pieces(queue: DownloadQueue, job: FileDownload, view: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of a file in order, as they arrive.

    A piece of an earlier run is compared with its CRC first, and fetched again if it differs. The
    iterator ends early if the download stops or the file restarts.
    """
    part = job.part
    for piece in range(part.count if part.size else 0):
        while True:
            with queue.changed:
                while not part.complete(piece):
                    if queue.stop.is_set() or job.again:
                        return
                    queue.changed.wait(POLL_S)
            if piece not in part.old or part.verify_piece(piece, view):
                break
            with queue.changed:
                queue.here -= part.done[piece]
                part.discard_piece(piece)
                job.pending.appendleft(piece)
                queue.changed.notify_all()
        at, end = piece * PIECE_BYTES, piece * PIECE_BYTES + part.length(piece)
        while at < end:
            if queue.stop.is_set() or job.again:
                return
            count = part.readinto(view[: min(end - at, len(view))], at)
            if count == 0:
                raise StackctlError(f"{part.path} was changed while it was fetched")
            yield view[:count]
            at += count
