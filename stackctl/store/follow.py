"""Hash files during the download: each piece is read from the page cache soon after its arrival."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from stackctl.errors import StackctlError
from stackctl.store.board import POLL_S, Board, Job, existing
from stackctl.store.part import PIECE_BYTES
from stackctl.store.wanted import Got, Wanted

_READ_BYTES: Final = 1 << 20
#: A file that is damaged once is fetched again; damaged twice, it is an error.
_MOST_DAMAGED: Final = 2


def follow(board: Board) -> None:
    """Hash one file after another until all are complete, and move each to its place."""
    view = memoryview(bytearray(_READ_BYTES))
    while True:
        with board.changed:
            while not board.hashing:
                if board.stop.is_set() or not board.left:
                    return
                board.changed.wait(POLL_S)
            job = board.hashing[0]
        got = _verified(board, job, view)
        if got is None:
            return
        board.finish(job, got)


def _verified(board: Board, job: Job, view: memoryview) -> Got | None:
    """Hash and check a file to its end; return None if the download stops before.

    A damaged file is fetched once more. Raises StackctlError if it is damaged again.
    """
    wanted, part, damaged = job.wanted, job.part, 0
    while True:
        job.again = False
        sha, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % wanted.size)
        for piece in _pieces(board, job, view):
            sha.update(piece)
            if wanted.git_sha1 is not None:
                blob.update(piece)
        if board.stop.is_set():
            return None
        if job.again:
            continue
        sha256 = sha.hexdigest()
        if _right(wanted, sha256, blob.hexdigest()):
            if wanted.named_by_hash:
                target = wanted.target.with_name(sha256)
                wanted = replace(wanted, target=target, sha256=sha256, named_by_hash=False)
                if (other := existing(wanted)) is not None:
                    # Keep it, because a process may be reading it. The caller checks its hash.
                    part.discard()
                    return other
            return Got(wanted, sha256, part.finish(wanted.target).st_mtime_ns)
        damaged += 1
        if damaged == _MOST_DAMAGED:
            part.reset()
            raise StackctlError(
                f"{wanted.name} came damaged, twice: its SHA-256 is {sha256[:16]}..., not "
                f"{(wanted.sha256 or wanted.git_sha1 or '')[:16]}...",
                hint="something on the way changes it (a proxy?), or the hub's copy is damaged",
            )
        with board.changed:
            board.note = f"{wanted.name} came damaged: once more"
            job.fresh = True
            board.changed.notify_all()
            while job.fresh and not board.stop.is_set():
                board.changed.wait(POLL_S)


def _right(wanted: Wanted, sha256: str, git_sha1: str) -> bool:
    if wanted.sha256 is not None:
        return wanted.sha256 == sha256
    return wanted.git_sha1 in (None, git_sha1)


def _pieces(board: Board, job: Job, view: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of a file in order, as they arrive.

    A piece of an earlier run is compared with its CRC first, and fetched again if it differs. The
    iterator ends early if the download stops or the file restarts.
    """
    part = job.part
    for piece in range(part.count if part.size else 0):
        while True:
            with board.changed:
                while not part.complete(piece):
                    if board.stop.is_set() or job.again:
                        return
                    board.changed.wait(POLL_S)
            if piece not in part.old or part.intact(piece, view):
                break
            with board.changed:
                board.here -= part.done[piece]
                part.forget(piece)
                job.pending.appendleft(piece)
                board.changed.notify_all()
        at, end = piece * PIECE_BYTES, piece * PIECE_BYTES + part.length(piece)
        while at < end:
            if board.stop.is_set() or job.again:
                return
            count = part.readinto(view[: min(end - at, len(view))], at)
            if count == 0:
                raise StackctlError(f"{part.path} was changed while it was fetched")
            yield view[:count]
            at += count
