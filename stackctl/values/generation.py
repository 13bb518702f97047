"""One numbered deployment of a stack: the document ``stackctl.generation/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.host import Host
from stackctl.values.plan import Decision, Plan
from stackctl.values.profile import Overrides, Profile
from stackctl.values.proxy import Proxy
from stackctl.values.unit import UnitSet

GenerationState = Literal["starting", "ready", "failed", "interrupted", "stopped", "replaced"]
Operation = Literal["up", "switch", "rollback"]


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
