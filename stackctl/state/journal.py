"""The journal of the change that is going on, ``STATE/transaction.json``; absent when none is."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.files import remove_file, write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.transaction import Transaction


class Journal:
    """Holds what a crash must not lose. Each step is on disk before it is begun."""

    def __init__(self, state: Path) -> None:
        self._path = state / "transaction.json"

    @property
    def open(self) -> bool:
        """Whether a change was begun and not ended; cheap."""
        return self._path.exists()

    def read(self) -> Transaction | None:
        """The change that is going on.

        Raises:
            StackctlError: the file is damaged, which no crash does: it is written atomically.
        """
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StackctlError(f"cannot read {self._path}: {error.strerror}") from None
        try:
            return from_json(text, Transaction, where=str(self._path))
        except StackctlError as error:
            raise StackctlError(
                "the journal of an interrupted change cannot be read",
                details=(error.message,),
                hint=f"see what runs (systemctl, podman ps), then remove {self._path}",
            ) from None

    def write(self, transaction: Transaction) -> None:
        """Put a step on disk."""
        write_atomically(self._path, to_json(transaction), mode=0o600)

    def step(self, transaction: Transaction, step: str, **changes: object) -> Transaction:
        """The transaction at its next step, on disk."""
        moved = msgspec.structs.replace(transaction, step=step, **changes)
        self.write(moved)
        return moved

    def clear(self) -> None:
        """The change is over."""
        remove_file(self._path)
