"""The context of a deployment: folders, service manager, and reports to the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.systemd import Systemd
from stackctl.state import logs
from stackctl.state.generations import Generations, Journal, utc_now
from stackctl.state.learned_facts import EngineFactsCache
from stackctl.state.paths import Paths
from stackctl.values.history import AuditEntry, AuditResult


class StepProgress(Protocol):
    """Receiver of progress. The command line implements it; nothing here prints."""

    def step(self, name: str, text: str) -> None:
        """Report a step that is done."""

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        """Report progress, in place of the last one; ``elapsed_s`` if it may take minutes."""


class Progress(StepProgress, Protocol):
    """Receiver of progress, changes and warnings."""

    def changes(
        self, title: str, rows: Sequence[tuple[str, str, str]], notes: Sequence[str]
    ) -> None:
        """Report the changes of a switch: rows of (field, now, then), and notes on their effect."""

    def warn(self, text: str, fix: str | None = None) -> None:
        """Report a problem that does not end the command, and the command that helps."""


@dataclass(frozen=True)
class Context:
    """One scope of one machine. ``confirm`` asks the user and may raise instead of answering."""

    paths: Paths
    machine: Machine
    systemd: Systemd
    progress: Progress
    confirm: Callable[[str], bool]

    @property
    def generations(self) -> Generations:
        """Return the stored generations of this scope."""
        return Generations(self.paths.state)

    @property
    def engine_facts(self) -> EngineFactsCache:
        """Return the cache of facts about engine images."""
        return EngineFactsCache(self.paths.cache)

    @property
    def journal(self) -> Journal:
        """Return the journal of this scope."""
        return Journal(self.paths.state)

    def write_audit_entry(
        self,
        operation: str,
        stack: str,
        *,
        result: AuditResult = "done",
        generation: int | None = None,
        message: str | None = None,
    ) -> None:
        """Add an entry to the audit log. A failure is only a warning: the operation is done."""
        entry = AuditEntry(
            when=utc_now(),
            user=logs.current_user(),
            operation=operation,
            stack=stack,
            generation=generation,
            result=result,
            message=message,
        )
        try:
            logs.record_change(self.paths.state, entry)
        except StackctlError as problem:
            self.progress.warn(f"not in the audit log: {problem.message}")
