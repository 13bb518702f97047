"""What happened to stacks: who changed what, and how well they were."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.result import Status


class AuditEntry(Value, frozen=True, kw_only=True):
    """One change that somebody asked for. ``user`` is the login name (and, below sudo, whose)."""

    when: str
    user: str
    operation: str
    stack: str
    generation: int | None = None
    result: Literal["done", "failed", "interrupted", "recovered", "nothing to do"]
    message: str | None = None


class Health(Value, frozen=True, kw_only=True):
    """How well a stack was at a moment (UTC, ISO 8601): the worst result of a check, and which."""

    when: str
    generation: int | None = None
    status: Status
    name: str | None = None
    message: str | None = None
