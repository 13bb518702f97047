"""The present state of stacks: the documents ``stackctl.status/1`` and ``stackctl.guard/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.history import HealthEntry

StackState = Literal[
    "ready", "starting", "failed", "crash loop", "stopped", "not answering", "unknown"
]


class StackStatus(Value, frozen=True, kw_only=True):
    """The present state of one stack; ``unknown`` if its record cannot be read.

    ``unit_state`` and ``door_state`` come from systemd, ``container_state`` and
    ``container_health`` from Podman (None: there is no such container). ``cause`` is the reason for
    a bad state, ``remedy`` the command against it. ``drift`` lists differences from the deployed
    state (unit files, settings of systemd, arguments), one line each. ``health`` is the result of
    the last check.
    """

    stack: str
    profile: str | None = None
    objective: str | None = None
    engine: str | None = None
    generation: int | None = None
    state: StackState
    cause: str | None = None
    remedy: str | None = None
    unit: str
    unit_state: str | None = None
    container: str | None = None
    container_state: str | None = None
    container_health: str | None = None
    door: str | None = None
    door_state: str | None = None
    since: str | None = None
    restarts: int | None = None
    endpoint: str | None = None
    model: str | None = None
    image: str | None = None
    health: HealthEntry | None = None
    drift: tuple[str, ...] = ()


class StatusReport(Value, frozen=True, kw_only=True):
    """All stacks of one scope; ``guard`` is True if its timer is on (None: there is no stack)."""

    schema: Literal["stackctl.status/1"] = "stackctl.status/1"
    scope: Literal["user", "system"]
    guard: bool | None = None
    stacks: tuple[StackStatus, ...]


class GuardResult(Value, frozen=True, kw_only=True):
    """The result of one pass of the guard for one stack; ``health`` is None if it was skipped."""

    stack: str
    action: Literal["none", "skipped", "restarted"] = "none"
    health: HealthEntry | None = None


class GuardReport(Value, frozen=True, kw_only=True):
    """One pass of ``stackctl guard``."""

    schema: Literal["stackctl.guard/1"] = "stackctl.guard/1"
    scope: Literal["user", "system"]
    stacks: tuple[GuardResult, ...]
