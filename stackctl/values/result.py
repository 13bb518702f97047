"""Results of checks: the document ``stackctl.check/1`` and similar documents."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

Status = Literal["ok", "warn", "fail", "skip", "info"]
#: Causes of a result on which code acts. Texts may be reworded freely; codes may not.
#: ``no-answer``: the server sent no HTTP answer at all. ``not-text``: it sent an answer, but
#: without sensible text.
ResultCode = Literal["no-answer", "not-text"]


class Result(Value, frozen=True, kw_only=True):
    """The result of one check: expected and actual state, with evidence and remedy.

    ``name`` is the key of the check. ``code`` is the cause, if stackctl's next action depends on
    it; otherwise None.
    """

    name: str
    status: Status
    expected: str | None = None
    actual: str | None = None
    evidence: str | None = None
    remedy: str | None = None
    code: ResultCode | None = None


class CheckReport(Value, frozen=True, kw_only=True):
    """Results of ``stackctl check``, most important first."""

    schema: Literal["stackctl.check/1"] = "stackctl.check/1"
    stack: str
    results: tuple[Result, ...]


class ChecksReport(Value, frozen=True, kw_only=True):
    """Results of ``stackctl check --all``, one report per stack."""

    schema: Literal["stackctl.checks/1"] = "stackctl.checks/1"
    scope: Literal["user", "system"]
    stacks: tuple[CheckReport, ...]


class VerifyReport(Value, frozen=True, kw_only=True):
    """Results of ``stackctl verify`` for a running generation, mismatches first."""

    schema: Literal["stackctl.verify/1"] = "stackctl.verify/1"
    stack: str
    generation: int
    results: tuple[Result, ...]


class DoctorReport(Value, frozen=True, kw_only=True):
    """Results of ``stackctl doctor``, most important first."""

    schema: Literal["stackctl.doctor/1"] = "stackctl.doctor/1"
    profile: str | None = None
    results: tuple[Result, ...]


class ReportFile(Value, frozen=True, kw_only=True):
    """The path of the page that ``stackctl report`` wrote."""

    schema: Literal["stackctl.report/1"] = "stackctl.report/1"
    stack: str
    path: str


class ErrorReport(Value, frozen=True, kw_only=True):
    """An error as ``--json`` prints it."""

    schema: Literal["stackctl.error/1"] = "stackctl.error/1"
    message: str
    hint: str | None = None
    details: tuple[str, ...] = ()
    exit_code: int
