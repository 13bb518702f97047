"""One numbered deployment of a stack: the document ``stackctl.generation/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.unit import UnitSet

State = Literal["starting", "ready", "failed", "interrupted", "stopped", "replaced"]


class Outcome(Value, frozen=True, kw_only=True):
    """How a generation ended up, and when (UTC, ISO 8601)."""

    state: State
    changed: str
    message: str | None = None
    ready_s: float | None = None


class Generation(Value, frozen=True, kw_only=True):
    """Everything about one deployment; only ``outcome`` changes after it is first written."""

    schema: Literal["stackctl.generation/1"] = "stackctl.generation/1"
    number: int
    stack: str
    created: str
    image: str
    image_id: str
    units: UnitSet
    plan: Plan
    host: Host
    outcome: Outcome
