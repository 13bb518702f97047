"""What is asked of a download, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wanted:
    """One file: what people call it, where it comes from, and where it goes.

    ``size`` in bytes. Its content is known by ``sha256``, or as a git blob by ``git_sha1``;
    without either only its size is. ``lock`` is the file whose lock says that it is being fetched.
    ``named_by_hash``: the whole file lies beside ``target``, under its SHA-256.
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
        """Whether a hash tells what it must be."""
        return self.sha256 is not None or self.git_sha1 is not None


@dataclass(frozen=True)
class Got:
    """A file that is there; ``mtime_ns`` and ``sha256`` are what tells whether it stays so.

    ``sha256`` is None for one that another process has put there: it was not looked at.
    """

    wanted: Wanted
    sha256: str | None
    mtime_ns: int


@dataclass(frozen=True)
class Patience:
    """How often in a row nothing may come, and the pauses in seconds, which double."""

    attempts: int = 8
    first_s: float = 1.0
    most_s: float = 60.0
