"""Numbered deployments of a stack, their units, and the record of a running change."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.host import Host
from stackctl.values.plan import Decision, Plan
from stackctl.values.profile import Overrides, Profile
from stackctl.values.proxy import Proxy

GenerationState = Literal["starting", "ready", "failed", "interrupted", "stopped", "replaced"]
Operation = Literal["up", "switch", "rollback"]


class UnitFile(Value, frozen=True, kw_only=True):
    """One file below the stack's unit folder: its bare name and its text."""

    name: str
    text: str


class UnitSet(Value, frozen=True, kw_only=True):
    """The units of one stack; ``service`` is the systemd service that Quadlet generates."""

    stack: str
    service: str
    container: str
    files: tuple[UnitFile, ...]


class UnitsReport(Value, frozen=True, kw_only=True):
    """The unit files that ``stackctl render`` writes."""

    schema: Literal["stackctl.units/1"] = "stackctl.units/1"
    stack: str
    service: str
    files: tuple[UnitFile, ...]


class EngineFact(Value, frozen=True, kw_only=True):
    """One property that a running engine reported, such as its context length."""

    name: str
    value: str


class Outcome(Value, frozen=True, kw_only=True):
    """The state of a generation, and the time of its last change (UTC, ISO 8601).

    ``report`` holds the facts that the engine reported when it was ready.
    """

    state: GenerationState
    changed: str
    message: str | None = None
    ready_s: float | None = None
    report: tuple[EngineFact, ...] = ()


#: The value of ``strategy`` if both engines run during the change (otherwise "stop first").
SIDE_BY_SIDE = "side by side"


class Generation(Value, frozen=True, kw_only=True):
    """One deployment: units, plan and outcome. Only ``outcome`` changes after it is first written.

    ``of`` is the generation whose stored text a rollback reinstalled. ``asked`` holds the settings
    from the command line. ``strategy`` is the way in which it replaced the previous generation.
    """

    schema: Literal["stackctl.generation/1"] = "stackctl.generation/1"
    number: int
    stack: str
    created: str
    operation: Operation = "up"
    of: int | None = None
    image: str
    image_id: str
    units: UnitSet
    door: Proxy | None = None
    plan: Plan
    profile: Profile | None = None
    asked: Overrides = Overrides()
    strategy: Decision | None = None
    host: Host
    outcome: Outcome

    @property
    def side_by_side(self) -> bool:
        """Return True if its engine answers before the old one stops."""
        return self.strategy is not None and self.strategy.value == SIDE_BY_SIDE


class Transaction(Value, frozen=True, kw_only=True):
    """A change that is under way. Its file stays on disk until the change has ended.

    ``before`` is the installed generation (None: there was none), ``running`` is True if it ran.
    ``after`` is the generation to install (None: none, the change is a ``down``). After a crash the
    next stackctl converges to ``after`` if ``committed`` is set, else to ``before``. ``step`` is
    the step that was begun last.
    """

    schema: Literal["stackctl.transaction/1"] = "stackctl.transaction/1"
    operation: Literal["up", "switch", "rollback", "restart", "down"]
    stack: str
    before: int | None = None
    running: bool = False
    after: int | None = None
    committed: bool = False
    step: str
    started: str

    @property
    def winner(self) -> int | None:
        """Return the generation to converge to after a crash; None: nothing shall be installed."""
        return self.after if self.committed else self.before
