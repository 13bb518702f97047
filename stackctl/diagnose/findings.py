"""Results of comparing, made and ordered alike."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from stackctl.values.generation import Generation
from stackctl.values.profile import Overrides
from stackctl.values.result import Result, Status
from stackctl.values.seen import Seen

_ORDER = {"fail": 0, "warn": 1}


def ok(name: str, expected: str | None, actual: str, evidence: str | None = None) -> Result:
    """As it was meant."""
    return Result(name=name, status="ok", expected=expected, actual=actual, evidence=evidence)


def info(name: str, expected: str | None, actual: str, evidence: str | None = None) -> Result:
    """Seen, and neither right nor wrong."""
    return Result(name=name, status="info", expected=expected, actual=actual, evidence=evidence)


def unseen(name: str, expected: str | None, why: str) -> Result:
    """Not known, and why: never taken for right."""
    return Result(name=name, status="skip", expected=expected, evidence=why)


def not_told(seen: Seen, name: str, expected: str | None, what: str | None = None) -> Result:
    """Not known, for the reason that the evidence gives."""
    return unseen(name, expected, seen.why_missing(what or name))


def fail(
    name: str, expected: str | None, actual: str, evidence: str | None, remedy: str | None
) -> Result:
    """Not as it was meant: the cause, and what to do."""
    return _told("fail", name, expected, actual, evidence, remedy)


def warn(
    name: str, expected: str | None, actual: str, evidence: str | None, remedy: str | None = None
) -> Result:
    """Not as one would wish, though it is no mismatch with the plan."""
    return _told("warn", name, expected, actual, evidence, remedy)


def _told(
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


def worst_first(results: Iterable[Result]) -> tuple[Result, ...]:
    """Mismatches, then warnings, then the rest as it came."""
    return tuple(sorted(results, key=lambda result: _ORDER.get(result.status, 2)))


def up_again(generation: Generation) -> str:
    """The command that deployed a generation: it puts back what was changed."""
    return up_command(generation.plan.profile, generation.asked)


def up_command(profile: str, asked: Overrides, *settings: str) -> str:
    """The command that deploys a profile with what was asked for, but for other settings."""
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
