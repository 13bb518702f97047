"""Access to the files that a source names, with similar names in the hints of errors."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import StackctlError


def resolve_path(text: str) -> Path:
    """Return the absolute path of a text; ``~`` is the user's home.

    Raises:
        StackctlError: the text is not UTF-8, or there is no home or current folder.
    """
    try:
        text.encode()
        return Path(text).expanduser().absolute()
    except UnicodeEncodeError:
        raise StackctlError(f"path {text!a} is not valid UTF-8") from None
    except (OSError, RuntimeError) as error:  # no home, or a deleted current folder
        raise StackctlError(f"cannot find {text}: {error}") from None


def real_path(path: Path, what: str, *, folder: bool = False) -> Path:
    """Return the file or folder behind all links, which a container can mount.

    Args:
        path: the file, the folder, or a link to it.
        what: a noun for errors, such as "model file".
        folder: True if errors should suggest folders instead of files.

    Raises:
        StackctlError: it does not exist, or cannot be read.
    """
    try:
        return path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, what, folder=folder) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StackctlError(f"cannot read {path}: {reason}") from None


@contextlib.contextmanager
def open_regular_file(path: str | Path) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading; yield its descriptor and its size in bytes.

    Raises:
        StackctlError: the file cannot be read, or is a directory, a pipe or a device.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise StackctlError(f"{path} is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise StackctlError(f"{path} is not a regular file")
        yield fd, status.st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(fd)


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        StackctlError: as in open_regular_file, or the file has more than ``limit`` bytes.
    """
    with open_regular_file(path) as (fd, _), open(fd, "rb", closefd=False) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise StackctlError(f"{path} has more than {limit} bytes")
    return raw


def _unreadable(path: str | Path, error: OSError | ValueError) -> StackctlError:
    return StackctlError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def _missing(path: Path, what: str, *, folder: bool) -> StackctlError:
    try:
        if path.is_symlink():
            return StackctlError(
                f"{what} not found: {path} is a link to {path.readlink()}, which does not exist"
            )
        near = sorted(itertools.islice(path.parent.iterdir(), 10_000))
        if folder:
            kind = "folders"
            names = [entry.name for entry in near if entry.is_dir()]
        else:
            kind = f"{path.suffix or '.gguf'} files"
            names = [entry.name for entry in near if entry.suffix == (path.suffix or ".gguf")]
    except OSError as error:
        reason = error.strerror or str(error)
        return StackctlError(f"{what} not found: {path}", hint=f"{path.parent}: {reason}")
    alike = difflib.get_close_matches(path.name, names, n=3)
    if alike:
        hint = f"did you mean {' or '.join(alike)}?"
    elif names:
        hint = f"{path.parent} has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    else:
        hint = f"{path.parent} has no {kind}"
    return StackctlError(f"{what} not found: {path}", hint=hint)
