"""What a deployment works with, and how it tells what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from stackctl.machine.files import Machine
from stackctl.machine.systemd import Systemd
from stackctl.state.enginefacts import EngineFactsCache
from stackctl.state.generations import Generations
from stackctl.state.journal import Journal
from stackctl.state.paths import Paths


class Report(Protocol):
    """Hears what happens; implemented by the command line, so that nothing here prints."""

    def step(self, name: str, text: str) -> None:
        """Something is done."""
        ...

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        """Something goes on; replaces the last progress. ``elapsed_s``: it may take minutes."""
        ...

    def changes(
        self, title: str, rows: Sequence[tuple[str, str, str]], notes: Sequence[str]
    ) -> None:
        """What a switch would change: rows of (field, now, then), and what it means."""
        ...

    def warn(self, text: str, fix: str | None = None) -> None:
        """Something the user should know, and the command that mends it."""
        ...


@dataclass(frozen=True)
class Context:
    """One scope of one machine. ``confirm`` asks the user and may raise instead of answering."""

    paths: Paths
    machine: Machine
    systemd: Systemd
    report: Report
    confirm: Callable[[str], bool]

    @property
    def generations(self) -> Generations:
        """Deployments of this scope."""
        return Generations(self.paths.state)

    @property
    def engine_facts(self) -> EngineFactsCache:
        """What is known of engine images."""
        return EngineFactsCache(self.paths.cache)

    @property
    def journal(self) -> Journal:
        """The change that is going on in this scope."""
        return Journal(self.paths.state)
