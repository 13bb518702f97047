"""The storage of models: file system, free space and read speed."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import posixpath
import time
from pathlib import Path

import msgspec

from stackctl.machine.machine import Machine
from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.values.host import Storage

_BLOCK = 8 * 2**20
#: Smaller files end before a disk reaches its speed.
_SMALLEST = 64 * 2**20
_MOST_FILES = 20_000


def probe_storage(machine: Machine, path: str) -> Storage:
    """Return the file system that holds a folder, and its free bytes (None on a recording).

    If the folder does not exist yet, its nearest parent counts.
    """
    reader = FactReader(machine)
    path = posixpath.normpath(path)
    free = None
    if machine.live:
        path = os.path.realpath(path)
        free = _free(path)
    return Storage(path=path, filesystem=_filesystem(reader, path), free_bytes=free)


def measure_storage(storage: Storage, *, seconds: float = 2.0) -> Storage:
    """Add the read speed of the largest file below the folder; None if no file is large."""
    file = _largest(Path(storage.path))
    speed = None if file is None else read_speed(file, seconds=seconds)
    return msgspec.structs.replace(storage, read_bytes_s=speed)


def read_speed(file: Path, *, seconds: float = 2.0) -> float | None:
    """Return the bytes per second of reading one file in order, past the page cache.

    One reader takes large blocks for at most ``seconds``, as an engine does that loads a model. If
    the file system has no direct reads, the file's pages are dropped from the cache first, except
    pages that other programs use. None if the file cannot be read or is too small.
    """
    try:
        if file.stat().st_size < _SMALLEST:
            return None
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return _timed(descriptor, seconds)
        finally:
            os.close(descriptor)
    except OSError:
        return None


def _timed(descriptor: int, seconds: float) -> float | None:
    # Direct reads need memory aligned to a page, which a mapping is.
    with mmap.mmap(-1, _BLOCK) as buffer:
        started = time.monotonic()
        total, elapsed = 0, 0.0
        while elapsed < seconds:
            count = os.readv(descriptor, [buffer])
            elapsed = time.monotonic() - started
            total += count
            if count < _BLOCK:
                break
    return total / elapsed if total >= _SMALLEST // 2 and elapsed > 0 else None


def _largest(folder: Path) -> Path | None:
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    sizes: dict[Path, int] = {}
    for path in itertools.islice(paths, _MOST_FILES):
        with contextlib.suppress(OSError):
            if path.is_file():
                sizes[path] = path.stat().st_size
    return max(sizes, key=lambda path: sizes[path], default=None)


def _free(path: str) -> int | None:
    place = Path(path)
    for folder in (place, *place.parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return None


def _filesystem(reader: FactReader, path: str) -> str | None:
    """Return the type of the file system that holds a path; of several mounts there, the last."""
    best: tuple[int, str] | None = None
    for line in (reader.text("/proc/self/mountinfo") or "").splitlines():
        words = line.split(" ")
        # A single dash ends the optional fields.
        if len(words) < 10 or "-" not in words[6:]:
            continue
        mount = _plain(words[4])
        kind = words[words.index("-", 6) + 1]
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and (best is None or len(mount) >= best[0]):
            best = (len(mount), kind)
    return sanitize(best[1]) if best else None


def _plain(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
