"""Finds the files that a source names, with errors that say what is near."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path

from stackctl.errors import StackctlError


def absolute(text: str) -> Path:
    """The absolute path that a user means; ``~`` is their home."""
    try:
        text.encode()
        return Path(text).expanduser().absolute()
    except UnicodeEncodeError:
        raise StackctlError(f"path {text!a} is not valid UTF-8") from None
    except (OSError, RuntimeError) as error:  # no home, or the current folder is gone
        raise StackctlError(f"cannot find {text}: {error}") from None


def real(path: Path, what: str) -> Path:
    """The file behind all links: the one whose folder a container can mount."""
    try:
        return path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, what) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StackctlError(f"cannot read {path}: {reason}") from None


def _missing(path: Path, what: str) -> StackctlError:
    try:
        if path.is_symlink():
            return StackctlError(
                f"{what} not found: {path} is a link to {path.readlink()}, which does not exist"
            )
        names = sorted(entry.name for entry in itertools.islice(path.parent.iterdir(), 10_000))
    except OSError as error:
        reason = error.strerror or str(error)
        return StackctlError(f"{what} not found: {path}", hint=f"{path.parent}: {reason}")
    names = [name for name in names if name.endswith(path.suffix or ".gguf")]
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"{path.parent} has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    else:
        hint = f"{path.parent} has no {path.suffix or '.gguf'} files"
    return StackctlError(f"{what} not found: {path}", hint=hint)
