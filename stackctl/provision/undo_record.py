"""The record of changes, ``STATE/provision.json``, which only its owner can read."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable
from pathlib import Path

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.files import remove_file, write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.provision import (
    Change,
    FileChange,
    GuardChange,
    PackagesChange,
    ProgramChange,
    RecordedChange,
    UndoRecord,
)

#: One path for all users, because the recorded changes are those of the machine.
PATH = "/var/lib/stackctl/provision.json"


class UndoStore:
    """The record on disk. A change is added to it before it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> UndoRecord:
        """Return the recorded changes; an empty record if there is no file.

        Raises:
            StackctlError: the file is damaged or may not be read.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return UndoRecord()
        except OSError as error:
            raise StackctlError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            return from_json(text, UndoRecord, where=str(self.path))
        except StackctlError as error:
            raise StackctlError(
                "the record of provisioning cannot be read",
                details=(error.message,),
                hint=f"--undo needs it; to begin a new one: mv {self.path} {self.path}.old",
            ) from None

    def add(self, new: RecordedChange) -> None:
        """Record a change that begins. If it repeats one on record, that one's ``before`` stays."""
        found = list(self.read().changes)
        for place, known in enumerate(found):
            if change_key(known.change) == change_key(new.change):
                found[place] = msgspec.structs.replace(known, change=new.change)
                break
        else:
            found.append(new)
        self._write(found)

    def drop(self, gone: RecordedChange) -> None:
        """Remove a reverted change from the record; remove the file with the last change."""
        left = [
            one for one in self.read().changes if change_key(one.change) != change_key(gone.change)
        ]
        if left:
            self._write(left)
        else:
            remove_file(self.path)
            # The folder is removed too if it is empty.
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def _write(self, changes: Iterable[RecordedChange]) -> None:
        write_atomically(self.path, to_json(UndoRecord(changes=tuple(changes))), mode=0o600)


def change_key(change: Change) -> Hashable:
    """Return a key that is equal for two changes of the same thing.

    A file, for example, is the same if its path is, whatever its text.
    """
    match change:
        case FileChange(path=path):
            return "file", path
        case ProgramChange(folder=folder):
            return "program", folder
        case GuardChange(user=user):
            return "guard", user
        case PackagesChange(names=names):
            return "packages", names
        case _:
            return change
