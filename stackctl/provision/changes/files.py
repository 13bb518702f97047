"""Files and folders."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.atomic_files import remove_file, write_atomically
from stackctl.provision.changes.kind import ChangeKind, CommandKind
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements.facts import MachineFacts
from stackctl.requirements.requirement import diff
from stackctl.values.provision import FileChange, FolderChange, PreviousState, ShownChange


class FileKind(ChangeKind[FileChange]):
    """A file of root. Before: its bytes, mode and owner, and the folders that do not exist."""

    def before(self, target: TargetRoot, change: FileChange) -> PreviousState:
        """See ChangeKind."""
        path = change.path
        folders = missing_folders(target, target.path_of(path).parent)
        found = target.stat(path)
        if found is None:
            return PreviousState(folders=folders)
        if not target.is_plain(path):
            raise StackctlError(f"{path} is not a file", hint=f"look at it: ls -l {path}")
        try:
            data = target.path_of(path).read_bytes()
        except OSError as error:
            raise StackctlError(f"cannot read {path}: {error.strerror}") from None
        return PreviousState(
            data=base64.b64encode(data).decode(),
            mode=found.st_mode & 0o7777,
            uid=found.st_uid,
            gid=found.st_gid,
            folders=folders,
        )

    def perform(self, target: TargetRoot, change: FileChange) -> None:
        """See ChangeKind."""
        write_atomically(
            target.path_of(change.path), change.text, mode=change.mode, keep_folder=True
        )

    def revert(self, target: TargetRoot, change: FileChange, old: PreviousState) -> str | None:
        """See ChangeKind."""
        path = change.path
        there = target.read(path)
        original = None if old.data is None else base64.b64decode(old.data)
        if there is not None and there != change.text and there.encode() != original:
            return f"{path} was changed since: it stays"
        if original is None:
            if there is not None:
                remove_file(target.path_of(path))
            return remove_folders(target, old.folders)
        # The original is a text of stackctl: a plan refuses to replace a foreign file.
        was = original.decode("utf-8", "surrogateescape")
        write_atomically(target.path_of(path), was, mode=old.mode or 0, keep_folder=True)
        os.chown(target.path_of(path), old.uid or 0, old.gid or 0)
        return None

    def describe(self, change: FileChange, facts: MachineFacts) -> ShownChange:
        """See ChangeKind."""
        before = facts.files.get(change.path)
        verb = "create" if before is None else "update"
        return ShownChange(
            what=f"{verb} {change.path} ({change.mode:04o})",
            diff=diff(before or "", change.text),
        )

    def describe_revert(self, change: FileChange, old: PreviousState) -> ShownChange:
        """See ChangeKind."""
        verb = "remove" if old.data is None else "put back the earlier"
        return ShownChange(what=f"{verb} {change.path}")


class FolderKind(CommandKind[FolderChange]):
    """A folder. Before: the folder and its parents, as far as they do not exist."""

    def before(self, target: TargetRoot, change: FolderChange) -> PreviousState:
        """See ChangeKind."""
        return PreviousState(folders=missing_folders(target, target.path_of(change.path)))

    def revert(self, target: TargetRoot, change: FolderChange, old: PreviousState) -> str | None:
        """See ChangeKind."""
        return remove_folders(target, old.folders, wanted=change.path)

    def command(self, change: FolderChange) -> tuple[str, ...]:
        """See CommandKind."""
        owner = change.owner
        whose = ("--owner", owner, "--group", owner) if owner else ()
        return ("install", "--directory", "--mode=0755", *whose, change.path)

    def words(self, change: FolderChange) -> str:
        """See CommandKind."""
        return f"create the folder {change.path} (0755, {change.owner or 'root'}'s)"

    def describe_revert(self, change: FolderChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"remove the folder {change.path}, if it is empty")


def missing_folders(target: TargetRoot, folder: Path) -> tuple[str, ...]:
    """Return the folder and its parents that do not exist, the innermost first."""
    found = []
    while not folder.exists():
        found.append("/" + str(folder.relative_to(target.root)))
        folder = folder.parent
    return tuple(found)


def remove_folders(
    target: TargetRoot, folders: Iterable[str], *, wanted: str | None = None
) -> str | None:
    """Remove empty folders, up to the first that is not. Return a reason if ``wanted`` stays."""
    for folder in folders:
        try:
            target.path_of(folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return f"{folder} is not empty: it stays" if folder == wanted else None
    return None
