"""Measure and remove folders that other programs have filled.

Those programs are not trusted, so no link in the folders is followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import StackctlError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: The unit of st_blocks in stat(2).
_BLOCK_BYTES = 512


def folder_sizes(above: Path) -> dict[str, int]:
    """Return the bytes on the disk of each folder in a folder, by name.

    Empty if ``above`` does not exist.
    """
    found = {}
    with contextlib.suppress(OSError), _opened(above) as descriptor:
        for entry in sorted(os.listdir(descriptor)):  # noqa: PTH208 - by descriptor
            with contextlib.suppress(OSError):
                os.close(os.open(entry, _FOLDER, dir_fd=descriptor))
                found[entry] = _bytes(entry, descriptor)
    return found


def remove_subfolder(above: Path, name: str) -> None:
    """Remove a folder in a folder, with its content. Raises StackctlError if that fails."""
    try:
        with _opened(above) as descriptor:
            # By descriptors at every level, so that no program can replace a folder by a link.
            shutil.rmtree(name, dir_fd=descriptor)
    except OSError as error:
        raise StackctlError(
            f"cannot remove {above / name}: {error.strerror or error}",
            hint=f"podman unshare rm -rf {above / name}" if os.geteuid() else None,
        ) from None


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _bytes(name: str, above: int) -> int:
    total = 0
    for _, folders, files, descriptor in os.fwalk(name, follow_symlinks=False, dir_fd=above):
        for entry in (*folders, *files):
            with contextlib.suppress(OSError):
                seen = os.stat(entry, dir_fd=descriptor, follow_symlinks=False)
                total += seen.st_blocks * _BLOCK_BYTES
    return total
