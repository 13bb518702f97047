"""What happened to stacks: who changed what, and how well they were."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.generation import Operation, State
from stackctl.values.plan import Scalar
from stackctl.values.result import Status

AuditResult = Literal["done", "failed", "interrupted", "recovered", "nothing to do"]


class AuditEntry(Value, frozen=True, kw_only=True):
    """One change that somebody asked for. ``user`` is the login name (and, below sudo, whose)."""

    when: str
    user: str
    operation: str
    stack: str
    generation: int | None = None
    result: AuditResult
    message: str | None = None


class Health(Value, frozen=True, kw_only=True):
    """How well a stack was at a moment (UTC, ISO 8601): the worst result of a check, and which."""

    when: str
    generation: int | None = None
    status: Status
    name: str | None = None
    message: str | None = None


class Entry(Value, frozen=True, kw_only=True):
    """One generation in short; of one that cannot be read only the number and why.

    ``current`` is the one that is installed. ``model`` is where the model came from, ``health``
    what was seen of it last.
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
    state: State | Literal["unreadable"]
    changed: str | None = None
    message: str | None = None
    ready_s: float | None = None
    health: Health | None = None


class HistoryReport(Value, frozen=True, kw_only=True):
    """All generations of a stack, newest first."""

    schema: Literal["stackctl.history/1"] = "stackctl.history/1"
    scope: Literal["user", "system"]
    stack: str
    generations: tuple[Entry, ...]


class AuditReport(Value, frozen=True, kw_only=True):
    """The audit log of a scope, oldest first; of one stack where ``stack`` says so."""

    schema: Literal["stackctl.audit/1"] = "stackctl.audit/1"
    scope: Literal["user", "system"]
    stack: str | None = None
    entries: tuple[AuditEntry, ...]


class Change(Value, frozen=True, kw_only=True):
    """One thing that differs; None where it is not set. ``reason`` is that of the later one."""

    field: str
    before: Scalar = None
    after: Scalar = None
    reason: str | None = None


class UnitChange(Value, frozen=True, kw_only=True):
    """How a unit file differs, as a unified diff; its generation's number apart."""

    name: str
    diff: str


class DiffReport(Value, frozen=True, kw_only=True):
    """What differs between two generations: what runs and where, every decision, the units."""

    schema: Literal["stackctl.diff/1"] = "stackctl.diff/1"
    stack: str
    before: int
    after: int
    facts: tuple[Change, ...]
    decisions: tuple[Change, ...]
    units: tuple[UnitChange, ...]


class PruneReport(Value, frozen=True, kw_only=True):
    """Generations that were removed (``dry_run``: would be), and those that stay.

    ``caches`` counts the folders of compiled code that went with them, of images that no generation
    uses any more; ``freed_bytes`` is what those took on disk.
    """

    schema: Literal["stackctl.prune/1"] = "stackctl.prune/1"
    stack: str
    dry_run: bool = False
    removed: tuple[int, ...]
    kept: tuple[int, ...]
    caches: int = 0
    freed_bytes: int = 0


class KeyReport(Value, frozen=True, kw_only=True):
    """Where the keys of a stack are and how many are valid; ``key`` is for ``key show`` alone."""

    schema: Literal["stackctl.key/1"] = "stackctl.key/1"
    stack: str
    path: str
    valid: int
    key: str | None = None
