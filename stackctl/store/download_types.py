"""The files that a download is asked for, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
