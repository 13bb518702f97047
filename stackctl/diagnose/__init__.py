"""Pure rules that find the causes of slow requests in an engine's metrics, log and plan.

``rules.py`` is the table of all rules. The ``compare`` modules compare a running stack with its
plan.
"""

from __future__ import annotations

from stackctl.diagnose.finding_text import with_steps
from stackctl.diagnose.load_summary import summarize_load
from stackctl.diagnose.rules import RULES
from stackctl.values.diagnosis import Evidence, Finding

_ORDER = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 3}


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Return the findings, most important first, then cleared subjects, then notes.

    Failures come before warnings, causes before their effects, and among equals the finding that
    concerns more of the requests' time.
    """
    load = summarize_load(evidence)
    found = []
    for kind, rules in enumerate(RULES):
        for rule in rules:
            finding = rule.check(evidence, load)
            if finding is None:
                continue
            stake = 0.0
            # Cleared subjects and notes stay in the order of the rules.
            if finding.status in ("fail", "warn"):
                stake = finding.at_stake or 0.0
                if rule.advice is not None:
                    finding = with_steps(finding, rule.advice(evidence, load))
            found.append(((_ORDER[finding.status], kind, -stake), finding))
    found.sort(key=lambda pair: pair[0])
    return tuple(finding for _, finding in found)
