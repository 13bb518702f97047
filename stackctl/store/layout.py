"""The store: a cache in the layout of Hugging Face's own tools, which read it and write it too.

    models--ORG--REPO/blobs/HASH                the bytes, by SHA-256 or as a git blob
    models--ORG--REPO/snapshots/COMMIT/PATH     links to them
    models--ORG--REPO/refs/NAME                 the commit that a name stands for
    .locks/models--ORG--REPO/HASH.lock          who fetches a file holds its lock

What others may have put there is not trusted: no folder on the way below a repository is a link,
and a file that should be a blob is one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import trust
from stackctl.machine.files import sync_folder, write_atomically
from stackctl.sources.hubcache import cache_folder, repo_folder


class Repository:
    """The place of one repository in the store; it need not exist yet."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.folder = repo_folder(repo)
        self.blobs = self.folder / "blobs"
        self.locks = cache_folder() / ".locks" / self.folder.name

    def prepare(self) -> None:
        """Make its folders.

        Raises:
            StackctlError: they cannot be made, or one of them is a link or another user's; as root,
                exit 2 for a place that other users could change.
        """
        trust.require_not_planted(self.folder)
        trust.require_root_only(self.folder, "models below")
        for folder in (self.blobs, self.folder / "snapshots", self.folder / "refs", self.locks):
            _make(folder)
            _require_folder(folder)

    def blob(self, name: str) -> Path:
        """Where the bytes of that name lie."""
        return self.blobs / name

    def lock(self, name: str) -> Path:
        """The file whose lock says that the blob of that name is being fetched."""
        return self.locks / f"{name}.lock"

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of a commit."""
        return self.folder / "snapshots" / commit

    def there(self, name: str, size: int) -> os.stat_result | None:
        """A blob of that name and size, if it is there.

        Raises:
            StackctlError: something else is in its place.
        """
        path = self.blob(name)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StackctlError(f"cannot read {path}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            kind = "a link" if stat.S_ISLNK(found.st_mode) else "no file"
            raise StackctlError(
                f"{path} is {kind}: the store holds files only",
                hint=f"look at it, then remove it: rm {path}",
            )
        return found if found.st_size == size else None

    def link(self, commit: str, names: Mapping[str, str]) -> Path:
        """Have a snapshot with these files: path to name of the blob. All of them or none.

        Returns:
            Its folder.

        Raises:
            StackctlError: something in the way is a link that leads elsewhere, or a file.
        """
        folder = self.snapshot(commit)
        try:
            if os.path.lexists(folder) or not self._link_anew(folder, names):
                for path, blob in names.items():
                    self._link(folder, path, blob)
            sync_folder(folder.parent)
        except OSError as error:
            raise StackctlError(f"cannot write {folder}: {error.strerror}") from None
        return folder

    def _link_anew(self, folder: Path, names: Mapping[str, str]) -> bool:
        """Make a snapshot in one step. Return False if another process makes it meanwhile."""
        draft = folder.with_name(f".{folder.name}.{threading.get_native_id()}")
        shutil.rmtree(draft, ignore_errors=True)  # of a killed process
        try:
            draft.mkdir()
            for path, blob in names.items():
                self._link(draft, path, blob)
            sync_folder(draft)
            draft.rename(folder)
        except OSError as error:
            if not folder.is_dir() or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return True

    def _link(self, folder: Path, path: str, blob: str) -> None:
        place = folder / path
        _require_folder(folder)
        for part in reversed(place.relative_to(folder).parents[:-1]):
            with contextlib.suppress(FileExistsError):
                (folder / part).mkdir()
            _require_folder(folder / part)
        up = "../" * (len(Path(path).parts) + 1)
        target = f"{up}blobs/{blob}"
        with contextlib.suppress(FileNotFoundError):
            if place.is_symlink() and str(place.readlink()) == target:
                return
            if not place.is_symlink():
                place.lstat()
                raise StackctlError(
                    f"{place} is in the way: it is no link to the store's files",
                    hint=f"look at it, then remove it: rm -r {place}",
                )
        draft = place.with_name(f".link.{threading.get_native_id()}")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        draft.replace(place)

    def name(self, revision: str, commit: str) -> None:
        """Have a name such as ``main`` stand for a commit."""
        place = self.folder / "refs" / revision
        for folder in reversed(place.relative_to(self.folder).parents[:-1]):
            _make(self.folder / folder)
            _require_folder(self.folder / folder)
        write_atomically(place, commit)

    def revisions(self) -> dict[str, str]:
        """Names and the commits that they stand for."""
        root, found = self.folder / "refs", {}
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 100:
                found[str(path.relative_to(root))] = path.read_text("ascii", "replace").strip()
        return found

    def remove(self, commit: str, paths: Mapping[str, str]) -> int:
        """Remove files of a snapshot, and the blobs that no other snapshot has.

        Returns:
            Bytes that were given back.
        """
        folder, freed = self.snapshot(commit), 0
        if not self.folder.exists():
            return 0
        try:
            for draft in folder.parent.glob(f".{commit}.*"):  # of killed processes
                shutil.rmtree(draft, ignore_errors=True)
            for link in folder.rglob(".link.*"):
                link.unlink()
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    (folder / path).unlink()
            used = self._used()
            for name in set(paths.values()) - used:
                with contextlib.suppress(FileNotFoundError):
                    freed += self.blob(name).lstat().st_size
                    self.blob(name).unlink()
            _prune(folder)
            if not folder.exists():
                for revision, named in self.revisions().items():
                    if named == commit:
                        (self.folder / "refs" / revision).unlink()
            if not any((self.folder / "snapshots").iterdir()) and not any(self.blobs.iterdir()):
                shutil.rmtree(self.folder)
                shutil.rmtree(self.locks, ignore_errors=True)
        except OSError as error:
            raise StackctlError(f"cannot remove {error.filename}: {error.strerror}") from None
        return freed

    def _used(self) -> set[str]:
        """Names of the blobs that links of snapshots lead to."""
        found = set()
        for path in (self.folder / "snapshots").rglob("*"):
            if path.is_symlink():
                found.add(path.readlink().name)
        return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackctlError(f"cannot make {folder}: {error.strerror}") from None


def _require_folder(folder: Path) -> None:
    """Raise StackctlError for a link in a folder's place: what is written there goes elsewhere."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise StackctlError(
            f"{folder} is not a folder of the store's: a link that leads out of it is not followed",
            hint=f"look at it, then remove it: rm {folder}",
        )


def _prune(folder: Path) -> None:
    """Remove folders that hold nothing."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
