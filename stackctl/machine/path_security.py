"""Detect paths that other users of this machine could change, and read their files as data only."""

from __future__ import annotations

import contextlib
import grp
import itertools
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stackctl.errors import ExitCode, StackctlError

#: A unit has at most 1 MiB and a home has few of them; more would be an attack.
_MOST_BYTES = 2 * 2**20
_MOST_FILES = 64
#: The kernel follows as many links (MAXSYMLINKS).
_MOST_LINKS = 40
_NO_WAIT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True)
class Weakness:
    """A folder, file or link through which another user could change a path.

    ``path`` is the level of the path that gives the right, ``code`` the kind of right, and
    ``holder`` the owner or group that has it (None: everybody).
    """

    path: str
    code: Literal["owner", "everybody", "group"]
    holder: str | None = None

    def __str__(self) -> str:
        """Return the weakness as a sentence for messages."""
        if self.code == "owner":
            return f"{self.path} belongs to {self.holder}"
        by = "everybody" if self.code == "everybody" else f"group {self.holder}"
        return f"{self.path} can be written by {by}"


def find_weakness(path: Path | str) -> Weakness | None:
    """Return the first right by which another user could change a path, or None if there is none.

    Every level of the path and every link on the way counts, because a user who may rename a folder
    can put another one in its place. In a sticky folder such as /tmp only the owner can. If the
    path does not exist yet, its existing levels count. Groups count for root only: other users
    choose their own groups.
    """
    trusted = {0, os.geteuid()}
    for level, found, last in _levels(Path(path)):
        if found.st_uid not in trusted:
            return Weakness(level, "owner", _name(found.st_uid))
        mode = found.st_mode
        if stat.S_ISLNK(mode) or (mode & stat.S_ISVTX and stat.S_ISDIR(mode) and not last):
            continue
        if mode & stat.S_IWOTH:
            return Weakness(level, "everybody")
        if mode & stat.S_IWGRP and os.geteuid() == 0 and found.st_gid != 0:
            return Weakness(level, "group", _group(found.st_gid))
    return None


def require_root_only(path: Path, what: str, hint: str | None = None) -> None:
    """Raise StackctlError (exit 2) if this is root and another user could change the path."""
    if os.geteuid() != 0 or (why := find_weakness(path)) is None:
        return
    raise StackctlError(
        f"root does not use {what} {path}: {why}",
        hint=hint or f"chown root:root {why.path} && chmod go-w {why.path}",
        exit_code=ExitCode.USAGE,
    )


def reject_foreign_symlink(path: Path) -> None:
    """Raise StackctlError (exit 2) for a path that goes through a link of another user.

    Refuse another user's file in a folder that everybody may write to, too: that user may have put
    it there.
    """
    trusted = {0, os.geteuid()}
    above: os.stat_result | None = None
    for level, found, _ in _levels(path):
        shared = above is not None and bool(above.st_mode & stat.S_IWOTH)
        if found.st_uid not in trusted and (
            stat.S_ISLNK(found.st_mode) or (shared and not stat.S_ISDIR(found.st_mode))
        ):
            kind = "link" if stat.S_ISLNK(found.st_mode) else "file"
            raise StackctlError(
                f"{level} is a {kind} that belongs to {_name(found.st_uid)}",
                hint="use a folder of your own",
                exit_code=ExitCode.USAGE,
            )
        above = found


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user may enter (0700), and the missing folders above it.

    Raises:
        StackctlError: the path is not a folder, belongs to another user, or cannot be made.
    """
    try:
        if not path.parent.exists():
            make_private_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        # A link is followed only if this user made it: another user's could be a trap.
        seen = path.stat()
        if not stat.S_ISDIR(seen.st_mode) or {seen.st_uid, path.lstat().st_uid} != {os.geteuid()}:
            raise StackctlError(
                f"{path} is not a folder of this user's own",
                hint=f"look at it, then remove it: rm {path}",
            )
        if seen.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise StackctlError(f"cannot make {path}: {error.strerror}") from None


def restrict_permissions(folder: Path) -> None:
    """Remove the rights of group and others from a folder of this user, if it exists."""
    try:
        descriptor = os.open(folder, _NO_WAIT | os.O_DIRECTORY)
    except OSError:
        return
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def read_user_files(home: str, below: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of the files ``HOME/BELOW/*/*SUFFIX``, which are untrusted data.

    Below the home no link is followed, and only regular files of the home's owner are read: no
    pipes, devices or other users' files. At most 64 files of 2 MiB together are read; unreadable
    files are left out.
    """
    opened: list[int] = []
    try:
        here = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.append(here)
        owner = os.fstat(here).st_uid
        for name in filter(None, below.split("/")):
            here = os.open(name, _NO_WAIT | os.O_DIRECTORY, dir_fd=here)
            opened.append(here)
        left_bytes, left_files = _MOST_BYTES, _MOST_FILES
        base = os.path.join(home, below) if below else home  # noqa: PTH118 - str, not Path
        for folder in _names(here, _MOST_FILES):
            try:
                inner = os.open(folder, _NO_WAIT | os.O_DIRECTORY, dir_fd=here)
            except OSError:
                continue
            opened.append(inner)
            for name in _names(inner, _MOST_FILES):
                if not name.endswith(suffix) or left_files == 0 or left_bytes <= 0:
                    continue
                left_files -= 1
                text = _owned(name, inner, owner, left_bytes)
                if text is not None:
                    left_bytes -= len(text)
                    yield f"{base}/{folder}/{name}", text.decode("utf-8", "replace")
            os.close(opened.pop())
    except OSError:
        return
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _owned(name: str, folder: int, owner: int, most: int) -> bytes | None:
    try:
        # Check the type before opening: opening a device can already have an effect.
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            return None
        descriptor = os.open(name, _NO_WAIT, dir_fd=folder)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != owner or found.st_size > most:
            return None
        return os.read(descriptor, most)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _names(folder: int, most: int) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in itertools.islice(entries, most))


def _levels(path: Path) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Yield path and status of each existing level from the root; the bool marks the last one.

    A link comes before its target.
    """
    # ".." must not be resolved in the text: after a link it leads to the target's parent.
    left = list(reversed((Path.cwd() / path).parts))
    here, links = "/", 0
    while left:
        part = left.pop()
        if part == "..":
            here = os.path.dirname(here)  # noqa: PTH120
            continue
        level = part if part.startswith("/") else os.path.join(here, part)  # noqa: PTH118
        try:
            found = os.lstat(level)
        except OSError:
            return
        yield level, found, not left
        if not stat.S_ISLNK(found.st_mode):
            here = level
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        left += reversed(Path(os.readlink(level)).parts)  # noqa: PTH115


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
