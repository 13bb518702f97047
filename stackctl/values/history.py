"""The present state of stacks, and their history: changes, and the results of checks."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.generation import GenerationState, Operation
from stackctl.values.plan import Scalar
from stackctl.values.result import Status

AuditResult = Literal["done", "failed", "interrupted", "recovered", "nothing to do"]


class AuditEntry(Value, frozen=True, kw_only=True):
    """One requested change. ``user`` is the login name, with the sudo caller in parentheses."""

    when: str
    user: str
    operation: str
    stack: str
    generation: int | None = None
    result: AuditResult
    message: str | None = None


class HealthEntry(Value, frozen=True, kw_only=True):
    """The worst result of one check of a stack: time (UTC, ISO 8601), status, and its name."""

    when: str
    generation: int | None = None
    status: Status
    name: str | None = None
    message: str | None = None


class HistoryEntry(Value, frozen=True, kw_only=True):
    """A summary of one generation; for an unreadable record only the number and the reason.

    ``current``: this generation is installed. ``model`` is the model's source, ``health`` the
    result of the last check.
    """

    number: int
    current: bool = False
    created: str | None = None
    operation: Operation | None = None
    of: int | None = None
    profile: str | None = None
    objective: str | None = None
    model: str | None = None
    image: str | None = None
    state: GenerationState | Literal["unreadable"]
    changed: str | None = None
    message: str | None = None
    ready_s: float | None = None
    health: HealthEntry | None = None


class HistoryReport(Value, frozen=True, kw_only=True):
    """All generations of a stack, newest first."""

    schema: Literal["stackctl.history/1"] = "stackctl.history/1"
    scope: Literal["user", "system"]
    stack: str
    generations: tuple[HistoryEntry, ...]


class AuditReport(Value, frozen=True, kw_only=True):
    """The audit log of a scope, oldest first; limited to ``stack`` if that is set."""

    schema: Literal["stackctl.audit/1"] = "stackctl.audit/1"
    scope: Literal["user", "system"]
    stack: str | None = None
    entries: tuple[AuditEntry, ...]


class FieldChange(Value, frozen=True, kw_only=True):
    """One value that differs; None if it is not set. ``reason`` is that of the later value."""

    field: str
    before: Scalar = None
    after: Scalar = None
    reason: str | None = None


class UnitChange(Value, frozen=True, kw_only=True):
    """A unified diff of a unit file; the generation's number in it is ignored."""

    name: str
    diff: str


class DiffReport(Value, frozen=True, kw_only=True):
    """The differences between two generations: facts, decisions of the plans, and unit files."""

    schema: Literal["stackctl.diff/1"] = "stackctl.diff/1"
    stack: str
    before: int
    after: int
    facts: tuple[FieldChange, ...]
    decisions: tuple[FieldChange, ...]
    units: tuple[UnitChange, ...]


class PruneReport(Value, frozen=True, kw_only=True):
    """Generations that were removed (``dry_run``: would be removed), and those that stay.

    ``caches`` counts the removed folders of compiled code, which belong to images that no
    generation uses any more; ``freed_bytes`` is their size on disk.
    """

    schema: Literal["stackctl.prune/1"] = "stackctl.prune/1"
    stack: str
    dry_run: bool = False
    removed: tuple[int, ...]
    kept: tuple[int, ...]
    caches: int = 0
    freed_bytes: int = 0


class KeyReport(Value, frozen=True, kw_only=True):
    """The file of a stack's keys, and the number of valid keys. Only ``key show`` sets ``key``."""

    schema: Literal["stackctl.key/1"] = "stackctl.key/1"
    stack: str
    path: str
    valid: int
    key: str | None = None


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
