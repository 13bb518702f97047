"""Results of checks: the document ``stackctl.check/1`` and its relatives."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

Status = Literal["ok", "warn", "fail", "skip", "info"]


class Result(Value, frozen=True, kw_only=True):
    """One thing that was looked at: expected against actual, with evidence and remedy."""

    name: str
    status: Status
    expected: str | None = None
    actual: str | None = None
    evidence: str | None = None
    remedy: str | None = None


class CheckReport(Value, frozen=True, kw_only=True):
    """Results of ``stackctl check``, most important first."""

    schema: Literal["stackctl.check/1"] = "stackctl.check/1"
    stack: str
    results: tuple[Result, ...]


class StackStatus(Value, frozen=True, kw_only=True):
    """What is true of one stack now."""

    stack: str
    profile: str
    objective: str
    engine: str
    generation: int
    state: Literal["ready", "starting", "failed", "stopped", "not answering"]
    unit: str
    unit_state: str | None = None
    since: str | None = None
    restarts: int | None = None
    endpoint: str
    model: str
    image: str


class StatusReport(Value, frozen=True, kw_only=True):
    """All stacks of one scope."""

    schema: Literal["stackctl.status/1"] = "stackctl.status/1"
    scope: Literal["user", "system"]
    stacks: tuple[StackStatus, ...]


class ErrorReport(Value, frozen=True, kw_only=True):
    """An error with ``--json``."""

    schema: Literal["stackctl.error/1"] = "stackctl.error/1"
    message: str
    hint: str | None = None
    details: tuple[str, ...] = ()
    exit_code: int
