"""Write and remove files so that no reader sees half of one, even after a power loss."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import path_security


def write_atomically(
    path: Path, text: str, *, mode: int = 0o644, keep_folder: bool = False
) -> None:
    """Write a file so that readers see the old text or the new one, also after a power loss.

    The temporary file is a dotfile without a unit suffix, so neither systemd nor Quadlet loads it.
    If ``mode`` gives no rights to group and others, the folder becomes private, too (0700). Set
    ``keep_folder`` to leave the mode of the folder as it is.

    Raises:
        StackctlError: the file cannot be written (disk full, no permission); nothing is left
            behind. Exit 2 if the path goes through a link of another user.
    """
    path_security.reject_foreign_symlink(path.parent)
    temporary = None
    try:
        if mode & 0o077 or keep_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path_security.make_private_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(
            prefix=".stackctl-", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StackctlError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108


def remove_file(path: Path) -> bool:
    """Remove a file so that it stays removed after a power loss.

    Returns:
        True if the file existed.

    Raises:
        StackctlError: the file cannot be removed.
    """
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StackctlError(f"cannot remove {path}: {error.strerror or error}") from None
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
