"""Pure rules from an engine's numbers, its log and its plan to what slows it down.

``rules.py`` is the table of all of them.
"""

from __future__ import annotations

from stackctl.diagnose.load import load_of
from stackctl.diagnose.rules import RULES
from stackctl.diagnose.telling import with_steps
from stackctl.values.diagnosis import Evidence, Finding

_ORDER = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 3}


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Findings, most important first; then what was cleared; then notes.

    What fails comes before what could be better, causes before what they cause, and among equals
    what more of the time is lost to.
    """
    load = load_of(evidence)
    found = []
    for kind, rules in enumerate(RULES):
        for rule in rules:
            finding = rule.check(evidence, load)
            if finding is None:
                continue
            stake = 0.0
            # Findings that are cleared or noted stay in the order of the rules.
            if finding.status in ("fail", "warn"):
                stake = finding.at_stake or 0.0
                if rule.advice is not None:
                    finding = with_steps(finding, rule.advice(evidence, load))
            found.append(((_ORDER[finding.status], kind, -stake), finding))
    found.sort(key=lambda pair: pair[0])
    return tuple(finding for _, finding in found)
