"""The store: a cache in the layout of Hugging Face's own tools, which read it and write it, too.

    models--ORG--REPO/blobs/HASH                the content, named by SHA-256 or as a git blob
    models--ORG--REPO/snapshots/COMMIT/PATH     links to blobs
    models--ORG--REPO/refs/NAME                 the commit that a name stands for
    .locks/models--ORG--REPO/HASH.lock          locked by the process that fetches the blob

The content is not trusted, because others may have written it. So folders below a repository must
not be links, and a blob must be a regular file.
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
from stackctl.machine import path_security
from stackctl.machine.files import sync_folder, write_atomically
from stackctl.sources.hub_cache import cache_folder, repo_folder


class Repository:
    """The folder of one repository in the store; it need not exist yet."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.folder = repo_folder(repo)
        self.blobs = self.folder / "blobs"
        self.locks = cache_folder() / ".locks" / self.folder.name

    def prepare(self) -> None:
        """Make the folders of the repository.

        Raises:
            StackctlError: they cannot be made, or one of them is a link. Exit 2 if the path goes
                through another user's link, or, for root, if other users could change it.
        """
        path_security.reject_foreign_symlink(self.folder)
        path_security.require_root_only(self.folder, "models below")
        for folder in (self.blobs, self.folder / "snapshots", self.folder / "refs", self.locks):
            _make_folder(folder)

    def blob_path(self, name: str) -> Path:
        """Return the path of a blob."""
        return self.blobs / name

    def lock_path(self, name: str) -> Path:
        """Return the lock file of a blob, which is locked while a process fetches the blob."""
        return self.locks / f"{name}.lock"

    def snapshot_path(self, commit: str) -> Path:
        """Return the folder with the files of a commit."""
        return self.folder / "snapshots" / commit

    def find_blob(self, name: str, size: int) -> os.stat_result | None:
        """Return the status of a blob, or None if it is absent or has another size.

        Raises:
            StackctlError: the path is not a regular file, or cannot be read.
        """
        path = self.blob_path(name)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StackctlError(f"cannot read {path}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            kind = "a link" if stat.S_ISLNK(found.st_mode) else "not a file"
            raise StackctlError(
                f"{path} is {kind}: the store holds files only",
                hint=f"look at it, then remove it: rm {path}",
            )
        return found if found.st_size == size else None

    def write_snapshot(self, commit: str, names: Mapping[str, str]) -> Path:
        """Make a snapshot, or add files to it. ``names`` maps each path to the name of its blob.

        A new snapshot appears with all its files at once.

        Returns:
            The folder of the snapshot.

        Raises:
            StackctlError: a file is in the way, or a folder on the way is a link.
        """
        folder = self.snapshot_path(commit)
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
        shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
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

    def set_ref(self, revision: str, commit: str) -> None:
        """Store the commit that a name such as ``main`` stands for."""
        place = self.folder / "refs" / revision
        for folder in reversed(place.relative_to(self.folder).parents[:-1]):
            _make_folder(self.folder / folder)
        write_atomically(place, commit)

    def revisions(self) -> dict[str, str]:
        """Return the names of commits, each with its commit."""
        root, found = self.folder / "refs", {}
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 100:
                found[str(path.relative_to(root))] = path.read_text("ascii", "replace").strip()
        return found

    def remove(self, commit: str, paths: Mapping[str, str]) -> int:
        """Remove files of a snapshot, and the blobs that no other snapshot has.

        Returns:
            The bytes that were freed.
        """
        folder, freed = self.snapshot_path(commit), 0
        if not self.folder.exists():
            return 0
        try:
            for draft in folder.parent.glob(f".{commit}.*"):  # left by killed processes
                shutil.rmtree(draft, ignore_errors=True)
            for link in folder.rglob(".link.*"):
                link.unlink()
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    (folder / path).unlink()
            snapshots = (self.folder / "snapshots").rglob("*")
            used = {link.readlink().name for link in snapshots if link.is_symlink()}
            for name in set(paths.values()) - used:
                with contextlib.suppress(FileNotFoundError):
                    freed += self.blob_path(name).lstat().st_size
                    self.blob_path(name).unlink()
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackctlError(f"cannot make {folder}: {error.strerror}") from None
    _require_folder(folder)


def _require_folder(folder: Path) -> None:
    """Raise StackctlError if the path is not a folder: a link could lead out of the store."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise StackctlError(
            f"{folder} is not a folder of the store's: a link that leads out of it is not followed",
            hint=f"look at it, then remove it: rm {folder}",
        )


def _prune(folder: Path) -> None:
    """Remove the empty folders in a folder, and the folder itself if it is empty then."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
