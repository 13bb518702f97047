"""Generations on disk, one JSON file each, ``STATE/stacks/STACK/NUMBER.json``, and the journal of
the change in progress, ``STATE/transaction.json``; absent without one."""

from __future__ import annotations

import contextlib
import datetime
import re
from pathlib import Path

import msgspec

from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import remove_file, write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.generation import Generation, GenerationState, Outcome, Transaction


class Generations:
    """The stored generations (deployments) of one scope."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "stacks"

    def numbers(self, stack: str) -> tuple[int, ...]:
        """Return the numbers of the stored generations of a stack, oldest first."""
        found = (path.stem for path in (self._folder / stack).glob("*.json"))
        return tuple(sorted(int(stem) for stem in found if re.fullmatch("[1-9][0-9]{0,8}", stem)))

    def stacks(self) -> tuple[str, ...]:
        """Return the names of the stacks that have stored generations."""
        found = (path.parent.name for path in self._folder.glob("*/*.json"))
        return tuple(name for name in sorted(set(found)) if self.numbers(name))

    def last_ready_before(self, stack: str, number: int | None) -> Generation | None:
        """Return the newest generation before that one (None: of all) that was ready once."""
        for older in reversed(self.numbers(stack)):
            if number is None or older < number:
                # A generation that cannot be read is no target of a rollback.
                with contextlib.suppress(StackctlError):
                    generation = self.read(stack, older)
                    if generation.outcome.state in ("ready", "replaced", "stopped"):
                        return generation
        return None

    def rollback_target(self, stack: str, number: int | None) -> Generation | None:
        """Return the target of a rollback from that generation (None: the stack is down).

        Two rollbacks in a row go back two generations: the one that the first rollback left is
        no target of the second.
        """
        if number is not None:
            with contextlib.suppress(StackctlError):
                number = self.read(stack, number).of or number
        return self.last_ready_before(stack, number)

    def read(self, stack: str, number: int) -> Generation:
        """Return one generation.

        Raises:
            StackctlError: exit 4 when no generation has that number; else the file is damaged, or
                this stackctl lacks the engine.
        """
        path = self._path(stack, number)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            known = ", ".join(map(str, self.numbers(stack))) or "none"
            raise StackctlError(
                f"{stack} has no generation {number}",
                hint=f"generations: {known}",
                exit_code=ExitCode.NOT_FOUND,
            ) from None
        except OSError as error:
            raise StackctlError(f"cannot read {path}: {error.strerror}") from None
        try:
            generation = from_json(text, Generation, where=str(path))
            # Nothing can be read from a stack without its engine. It must not hide other stacks.
            find_engine(generation.plan.engine)
        except StackctlError as error:
            raise StackctlError(
                f"the record of generation {number} of {stack} cannot be read",
                details=(error.message,),
                hint=f"stackctl down {stack} still works; then stackctl up writes a new one",
            ) from None
        return generation

    def write(self, generation: Generation) -> None:
        """Store a generation, readable by this user only because plans name paths."""
        path = self._path(generation.stack, generation.number)
        write_atomically(path, to_json(generation), mode=0o600)

    def set_outcome(
        self, generation: Generation, state: GenerationState, **outcome: object
    ) -> Generation:
        """Store a generation with a new outcome and return it; its other fields never change.

        A generation that ends after it served keeps its start time and its engine's facts.
        """
        ended = Outcome(state=state, changed=utc_now())
        if state in ("replaced", "stopped"):
            before = generation.outcome
            ended = msgspec.structs.replace(ended, ready_s=before.ready_s, report=before.report)
        changed = msgspec.structs.replace(
            generation, outcome=msgspec.structs.replace(ended, **outcome)
        )
        self.write(changed)
        return changed

    def remove(self, stack: str, number: int) -> None:
        """Delete one generation; it need not be readable."""
        remove_file(self._path(stack, number))

    def _path(self, stack: str, number: int) -> Path:
        return self._folder / stack / f"{number}.json"


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


def utc_now() -> str:
    """Return the current time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
