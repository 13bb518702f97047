"""The speed of a download: measured, and limited."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stackctl.quantity import format_bytes, format_duration

_WINDOW_S = 10.0


@dataclass(frozen=True)
class DownloadProgress:
    """Done and total bytes, and the recent speed in bytes per second (None: unknown).

    ``note`` is the reason for waiting (None: no wait).
    """

    done: int
    total: int
    speed: float | None = None
    note: str | None = None

    def text(self) -> str:
        """Return a line such as ``3.2 GiB of 21.9 GiB, 112 MiB/s, 2:51 left``."""
        words = [f"{format_bytes(self.done)} of {format_bytes(self.total)}"]
        if self.note is not None:
            words.append(self.note)
        elif self.speed:
            words.append(f"{format_bytes(round(self.speed))}/s")
            words.append(f"{format_duration((self.total - self.done) / self.speed)} left")
        return ", ".join(words)


ProgressCallback = Callable[[DownloadProgress], None]


def no_progress(_: DownloadProgress) -> None:
    """Ignore the progress."""


class ProgressMeter:
    """Measures the speed over the last 10 s, and reports the progress of ``total`` bytes."""

    def __init__(self, total: int, report: ProgressCallback = no_progress) -> None:
        self.done = 0
        self._total = total
        self._report = report
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Report ``count`` more bytes as done."""
        self.done += count
        self.report(self.done, self.done)

    def report(self, done: int, came: int, *, note: str | None = None) -> None:
        """Report the progress at ``done`` bytes; ``came`` is the number received in this run."""
        now = time.monotonic()
        self._seen.append((now, came))
        while now - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        begin, first = self._seen[0]
        speed = (came - first) / (now - begin) if now - begin > 0.5 else None
        speed = speed if speed and speed > 0 else None
        self._report(DownloadProgress(done, self._total, speed, note))


class RateLimiter:
    """Limits the bytes per second of several threads together; None is no limit."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, count: int, stop: threading.Event) -> None:
        """Wait until ``count`` more bytes are within the limit, or ``stop`` is set."""
        if self._limit is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._limit
            wait = self._free_at - now
        stop.wait(wait)
