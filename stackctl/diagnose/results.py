"""Results and findings: their makers, their order, and numbers and commands in their texts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from stackctl.diagnose.load_summary import ValueRange
from stackctl.values.diagnosis import Finding
from stackctl.values.generation import Generation
from stackctl.values.inspection import Inspection
from stackctl.values.profile import Overrides
from stackctl.values.result import Result, Status

_ORDER = {"fail": 0, "warn": 1}


@dataclass(frozen=True)
class Comparison:
    """One comparison of ``verify``: its name and the planned state, to which results are added."""

    name: str
    expected: str | None = None

    def ok(self, actual: str, evidence: str | None = None) -> Result:
        """Return a result for a state that is as expected."""
        return self._result("ok", actual, evidence)

    def info(self, actual: str, evidence: str | None = None) -> Result:
        """Return a result for a fact that is neither right nor wrong."""
        return self._result("info", actual, evidence)

    def skip(self, why: str) -> Result:
        """Return a skipped result for an unknown fact, with the reason."""
        return self._result("skip", None, why)

    def skip_missing(self, inspection: Inspection, what: str | None = None) -> Result:
        """Return a skipped result with the reason of a missing fact (``what``, else the name)."""
        return self.skip(inspection.reason_missing(what or self.name))

    def fail(self, actual: str, cause: str | None, remedy: str | None) -> Result:
        """Return a failure; the cause is its evidence."""
        return self._result("fail", actual, cause, remedy)

    def warn(self, actual: str, cause: str | None, remedy: str | None = None) -> Result:
        """Return a warning for a bad state that is not a mismatch with the plan."""
        return self._result("warn", actual, cause, remedy)

    def _result(
        self, status: Status, actual: str | None, evidence: str | None, remedy: str | None = None
    ) -> Result:
        return Result(
            name=self.name,
            status=status,
            expected=self.expected,
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


def format_rate(value: float) -> str:
    """Return a number of tokens per second as text; below ten with one decimal."""
    return f"{value:.1f}" if round(value, 1) < 10 else f"{value:,.0f}"


def format_value_range(seen: ValueRange, scale: float = 1.0) -> str:
    """Return a range as text, such as ``4.0-8.0``; one number if both ends read the same."""
    low, high = seen.low * scale, seen.high * scale
    # Both ends have the same number of decimals, up to 100.
    digits = 1 if round(low, 1) < 10 and high < 100 else 0
    texts = [f"{value:,.{digits}f}" if digits else format_rate(value) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def format_seconds(value: float) -> str:
    """Return a time as text: ``0.21 s``, ``7.5 s``, ``30 s``."""
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def format_count(number: float, what: str) -> str:
    """Return a number with its noun: ``1 request``, ``2 requests``."""
    return f"{number:,.0f} {what}" + ("" if round(number) == 1 else "s")


def cleared(name: str, actual: str, expected: str | None = None) -> Finding:
    """Return the finding of a rule that rules its cause out."""
    return Finding(name=name, status="ok", actual=actual, expected=expected)
