"""Hash files during the download: each piece is read from the page cache soon after its arrival."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from stackctl.errors import StackctlError
from stackctl.store.download_queue import POLL_S, DownloadQueue, FileDownload, existing
from stackctl.store.download_types import DownloadedFile, DownloadRequest
from stackctl.store.partial_file import PIECE_BYTES

_READ_BYTES: Final = 1 << 20
#: A file that is damaged once is fetched again; damaged twice, it is an error.
_MOST_DAMAGED: Final = 2


def hash_files(queue: DownloadQueue) -> None:
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
