"""Makers of results, their order, and the commands in their remedies."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from stackctl.values.generation import Generation
from stackctl.values.inspection import Inspection
from stackctl.values.profile import Overrides
from stackctl.values.result import Result, Status

_ORDER = {"fail": 0, "warn": 1}


def ok(name: str, expected: str | None, actual: str, evidence: str | None = None) -> Result:
    """Return a result for a state that is as expected."""
    return Result(name=name, status="ok", expected=expected, actual=actual, evidence=evidence)


def info(name: str, expected: str | None, actual: str, evidence: str | None = None) -> Result:
    """Return a result for a fact that is neither right nor wrong."""
    return Result(name=name, status="info", expected=expected, actual=actual, evidence=evidence)


def skip(name: str, expected: str | None, why: str) -> Result:
    """Return a skipped result for an unknown fact; ``why`` is the reason."""
    return Result(name=name, status="skip", expected=expected, evidence=why)


def skip_missing(
    inspection: Inspection, name: str, expected: str | None, what: str | None = None
) -> Result:
    """Return a skipped result; the reason is that of a missing fact (``what``, else ``name``)."""
    return skip(name, expected, inspection.reason_missing(what or name))


def fail(
    name: str, expected: str | None, actual: str, evidence: str | None, remedy: str | None
) -> Result:
    """Return a failure, with the cause as its evidence and the remedy."""
    return _result("fail", name, expected, actual, evidence, remedy)


def warn(
    name: str, expected: str | None, actual: str, evidence: str | None, remedy: str | None = None
) -> Result:
    """Return a warning for a bad state that is not a mismatch with the plan."""
    return _result("warn", name, expected, actual, evidence, remedy)


def _result(
    status: Status,
    name: str,
    expected: str | None,
    actual: str,
    evidence: str | None,
    remedy: str | None,
) -> Result:
    return Result(
        name=name,
        status=status,
        expected=expected,
        actual=actual,
        evidence=evidence,
        remedy=remedy,
    )


def sort_by_severity(results: Iterable[Result]) -> tuple[Result, ...]:
    """Sort results: failures, then warnings, then the others in their order."""
    return tuple(sorted(results, key=lambda result: _ORDER.get(result.status, 2)))


def redeploy_command(generation: Generation) -> str:
    """Return the command that deployed a generation; it restores the planned state."""
    return deploy_command(generation.plan.profile, generation.asked)


def deploy_command(profile: str, asked: Overrides, *settings: str) -> str:
    """Return the command that deploys a profile with the earlier command line and new settings.

    ``asked`` is the earlier command line. ``settings`` are KEY=VALUE texts; they replace earlier
    ones with the same key.
    """
    new = {text.partition("=")[0] for text in settings}
    kept = [text for text in asked.sets if text.partition("=")[0] not in new]
    words = ["stackctl", "up", profile]
    for option, value in (
        ("--model", asked.model),
        ("--objective", asked.objective),
        ("--name", asked.name),
        *(("--set", text) for text in (*kept, *settings)),
    ):
        words += [option, value] if value is not None else []
    return shlex.join(words)
