"""The journal of the change in progress, ``STATE/transaction.json``; absent without one."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.files import remove_file, write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.generation import Transaction


class Journal:
    """The journal of one scope. Each step is on disk before it begins, so a crash loses none."""

    def __init__(self, state: Path) -> None:
        self._path = state / "transaction.json"

    @property
    def is_open(self) -> bool:
        """Return True when a change has begun and not ended; one stat call."""
        return self._path.exists()

    def read(self) -> Transaction | None:
        """Return the change in progress; None without one.

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
        """Write a step to disk."""
        write_atomically(self._path, to_json(transaction), mode=0o600)

    def step(self, transaction: Transaction, step: str, **changes: object) -> Transaction:
        """Write the transaction at its next step to disk and return it."""
        moved = msgspec.structs.replace(transaction, step=step, **changes)
        self.write(moved)
        return moved

    def clear(self) -> None:
        """Delete the journal, because the change has ended."""
        remove_file(self._path)
