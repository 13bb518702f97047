"""The interface of all kinds of changes."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from stackctl.machine import runner
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements.facts import MachineFacts
from stackctl.values.provision import PreviousState, ShownChange

C = TypeVar("C")


class ChangeKind(ABC, Generic[C]):
    """Makes the changes of one type, reverts them and describes them."""

    def before(self, target: TargetRoot, change: C) -> PreviousState:  # noqa: ARG002
        """Return the state that a change replaces, complete enough to restore it.

        Raises:
            StackctlError: the state cannot be read, or packages cannot be found.
        """
        return PreviousState()

    @abstractmethod
    def perform(self, target: TargetRoot, change: C) -> None:
        """Make a change. Raises StackctlError if it fails; part of it may be made then."""

    @abstractmethod
    def revert(self, target: TargetRoot, change: C, old: PreviousState) -> str | None:
        """Restore ``old``. Return the reason if the change has to stay, None if it is reverted.

        A change stays, for example, if somebody has edited its file since.

        Raises:
            StackctlError: it could not be restored.
        """

    @abstractmethod
    def describe(self, change: C, facts: MachineFacts) -> ShownChange:
        """Describe a change on the machine of these facts."""

    @abstractmethod
    def describe_revert(self, change: C, old: PreviousState) -> ShownChange:
        """Describe the effect of a revert."""


class CommandKind(ChangeKind[C]):
    """A kind whose changes can be made by one command, also by hand."""

    @abstractmethod
    def command(self, change: C) -> tuple[str, ...]:
        """Return the command that makes a change."""

    @abstractmethod
    def words(self, change: C) -> str:
        """Describe a change in words."""

    def perform(self, target: TargetRoot, change: C) -> None:  # noqa: ARG002
        """See ChangeKind."""
        runner.run(self.command(change), timeout_s=120)

    def describe(self, change: C, facts: MachineFacts) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=self.words(change), command=shlex.join(self.command(change)))
