"""Pure rules: from an engine's numbers, its log and its plan to what slows it down.

``diagnose`` looks at everything there is evidence for. A rule gives a finding, clears what it is
about (status ok), or says nothing where nothing is known: what cannot be proven is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable

from stackctl.diagnose import causes, limits, stillness
from stackctl.diagnose.load import Load, load_of
from stackctl.values.diagnosis import Evidence, Finding

Rule = Callable[[Evidence, Load], Finding | None]

#: What is wrong with the machine or the launch explains slow numbers, so it comes before them.
_RULES: tuple[tuple[Rule, ...], ...] = (
    (stillness.hang,),
    (causes.cpu_fallback, causes.threads, causes.pages, causes.throttled),
    (
        limits.decode, limits.prefill, limits.queueing, limits.kv, limits.prefix, limits.answers,
        causes.loop_model, limits.context,
    ),
    (stillness.idle, stillness.empty_windows, stillness.silent),
)  # fmt: skip
_ORDER = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 3}


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Findings, most important first; then what was cleared; then notes.

    What fails comes before what could be better, causes before what they cause, and among equals
    what more of the time is lost to.
    """
    load = load_of(evidence)
    found = []
    for kind, rules in enumerate(_RULES):
        for rule in rules:
            if (finding := rule(evidence, load)) is not None:
                # What is cleared or noted stays in the order of the rules.
                stake = finding.at_stake or 0.0 if finding.status in ("fail", "warn") else 0.0
                found.append(((_ORDER[finding.status], kind, -stake), finding))
    found.sort(key=lambda pair: pair[0])
    return tuple(finding for _, finding in found)
