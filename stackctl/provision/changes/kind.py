"""A kind of change of a machine: what its class has to do."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from stackctl.machine import runner
from stackctl.provision.box import Box
from stackctl.requirements.facts import MachineFacts
from stackctl.values.provision import Before, ShownChange

C = TypeVar("C")


class ChangeKind(ABC, Generic[C]):
    """Makes the changes of one type, takes them back and describes them."""

    def before(self, box: Box, change: C) -> Before:  # noqa: ARG002
        """Return the state that a change replaces, complete enough to restore it.

        Raises:
            StackctlError: it cannot be read, or packages cannot be found.
        """
        return Before()

    @abstractmethod
    def perform(self, box: Box, change: C) -> None:
        """Make a change. Raises StackctlError, and then nothing or all of it is done."""

    @abstractmethod
    def revert(self, box: Box, change: C, old: Before) -> str | None:
        """Restore ``old``. Return a reason when somebody has changed it since, and it stays.

        Raises:
            StackctlError: it could not be restored.
        """

    @abstractmethod
    def describe(self, change: C, facts: MachineFacts) -> ShownChange:
        """Describe a change on the machine of these facts."""

    @abstractmethod
    def describe_revert(self, change: C, old: Before) -> ShownChange:
        """Describe what it means to take a change back."""


class CommandKind(ChangeKind[C]):
    """A kind whose changes are made by one command, which people can run by hand too."""

    @abstractmethod
    def command(self, change: C) -> tuple[str, ...]:
        """Return the command that makes a change."""

    @abstractmethod
    def words(self, change: C) -> str:
        """Describe a change in words."""

    def perform(self, box: Box, change: C) -> None:  # noqa: ARG002
        """See ChangeKind."""
        runner.run(self.command(change), timeout_s=120)

    def describe(self, change: C, facts: MachineFacts) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=self.words(change), command=shlex.join(self.command(change)))
