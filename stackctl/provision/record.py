"""The record of what was changed: ``STATE/provision.json``, for its owner alone."""

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
    Record,
    Recorded,
)

#: Where the record is, whoever asks: what it tells of is the machine's, not a user's.
PATH = "/var/lib/stackctl/provision.json"


class Store:
    """Each change is on disk here before it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Record:
        """What was changed. Raises StackctlError when it is damaged or may not be read."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return Record()
        except OSError as error:
            raise StackctlError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            return from_json(text, Record, where=str(self.path))
        except StackctlError as error:
            raise StackctlError(
                "the record of provisioning cannot be read",
                details=(error.message,),
                hint=f"--undo needs it; to begin a new one: mv {self.path} {self.path}.old",
            ) from None

    def add(self, new: Recorded) -> None:
        """Record a change that begins. What was there before the first of its kind stays."""
        found = list(self.read().changes)
        for place, known in enumerate(found):
            if identity(known.change) == identity(new.change):
                found[place] = msgspec.structs.replace(known, change=new.change)
                break
        else:
            found.append(new)
        self._write(found)

    def drop(self, gone: Recorded) -> None:
        """Forget a change that was taken back; with the last one the record goes."""
        left = [one for one in self.read().changes if identity(one.change) != identity(gone.change)]
        if left:
            self._write(left)
        else:
            remove_file(self.path)
            # With nothing else of stackctl's on this machine, its folder goes as well.
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def _write(self, changes: Iterable[Recorded]) -> None:
        write_atomically(self.path, to_json(Record(changes=tuple(changes))), mode=0o600)


def identity(change: Change) -> Hashable:
    """What makes a change the same one again, though it writes another text than last time."""
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
