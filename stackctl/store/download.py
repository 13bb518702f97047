"""Download files over several connections at once, and resume earlier downloads.

Each connection (download_worker.py) fetches one piece after another, in order, of the first file
that lacks pieces. One thread (hash_worker.py) hashes the bytes soon after their arrival, so that a
file is verified a moment after its last byte. partial_file.py stores the state between runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from stackctl.store.download_queue import POLL_S, DownloadQueue
from stackctl.store.download_rate import DownloadProgress, RateLimiter, SpeedMeter
from stackctl.store.download_types import DownloadedFile, DownloadRequest, RetryPolicy
from stackctl.store.download_worker import DownloadWorker
from stackctl.store.hash_worker import hash_files

CONNECTIONS: Final = 4
_PATIENCE: Final = RetryPolicy()


def download_files(
    files: Sequence[DownloadRequest],
    *,
    secret: str | None = None,
    limit: float | None = None,
    connections: int = CONNECTIONS,
    retries: RetryPolicy = _PATIENCE,
    timeout_s: float = 30,
    tell: Callable[[DownloadProgress], None] = lambda _: None,
) -> list[DownloadedFile]:
    """Download files. Only complete, verified files get their name; parts stay for the next run.

    Args:
        files: no two with the same target.
        secret: a token for the servers of their URLs; no other server gets it.
        limit: bytes per second, of all connections together.
        connections: their number.
        retries: their number and pauses while no bytes arrive.
        timeout_s: seconds for which a connection may be silent.
        tell: called with the progress a few times a second, in the caller's thread.

    Raises:
        StackctlError: a file cannot be fetched or verified; the message names it.
    """
    queue = DownloadQueue(files)
    limiter, pace = RateLimiter(limit), SpeedMeter(sum(file.size for file in files))
    receivers = [
        DownloadWorker(queue, secret=secret, limiter=limiter, retries=retries, timeout_s=timeout_s)
        for _ in range(max(1, connections))
    ]
    work: list[Callable[[], None]] = [receiver.run for receiver in receivers]
    work.append(lambda: hash_files(queue))
    threads = [threading.Thread(target=queue.run_guarded, args=(one,)) for one in work]
    try:
        for thread in threads:
            thread.start()
        while queue.left and queue.error is None:
            with queue.changed:
                queue.changed.wait(POLL_S)
            queue.retry_locked()
            tell(pace.progress_at(queue.bytes_present(), queue.came, note=queue.note))
    finally:
        queue.stop_all()
        for receiver in receivers:
            receiver.transfer.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        queue.close()
    if queue.error is not None:
        raise queue.error
    return queue.got
