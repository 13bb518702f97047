"""The table of all findings of ``stackctl diagnose``, and their order. Add a new finding here.

A rule is a function of the evidence and the load. It returns a finding, clears its subject (status
ok), or returns None if the evidence proves neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from stackctl.diagnose import bottlenecks, causes, remedies, stalls
from stackctl.diagnose.load_summary import LoadSummary, summarize_load
from stackctl.values.diagnosis import Evidence, Finding, Step


@dataclass(frozen=True)
class Rule:
    """One row of the table: the names of a rule's findings, the rule, and the steps against them.

    ``advice`` is None if the steps depend on details of the finding; such a rule sets them itself.
    """

    names: tuple[str, ...]
    check: Callable[[Evidence, LoadSummary], Finding | None]
    advice: Callable[[Evidence, LoadSummary], tuple[Step, ...]] | None = None


#: A hang hides all other findings.
HANG = (Rule(("hang", "standing-still"), stalls.hang),)
#: Faults of the machine or of the launch explain slow numbers, so they come before them.
CAUSES = (
    Rule(("cpu-fallback",), causes.cpu_fallback),
    Rule(("oversubscribed-threads",), causes.cpu_contention),
    Rule(("page-cache-misplacement",), causes.memory_placement),
    Rule(("thermal-limit", "power-limit"), causes.gpu_throttling),
)
#: Limits of the speed of requests.
LIMITS = (
    Rule(("decode-bound",), bottlenecks.slow_decode, remedies.speed_up_generation),
    Rule(("prefill-bound",), bottlenecks.slow_prefill, remedies.speed_up_prompts),
    Rule(("queueing",), bottlenecks.long_queue, remedies.shorten_queue),
    Rule(("kv-pressure",), bottlenecks.kv_cache_pressure, remedies.relieve_kv_cache),
    Rule(("prefix-cache-misses",), bottlenecks.prefix_cache_misses, remedies.stabilize_prefix),
    Rule(("whole-file-edits",), bottlenecks.long_answers, remedies.shorten_answers),
    Rule(("loop-model",), causes.looped_model),
    Rule(("context-oversized",), bottlenecks.oversized_context, remedies.oversized_context),
)
#: Notes on numbers that look like faults but are not faults.
NOTES = (
    Rule(("idle",), stalls.idle_windows),
    Rule(("empty-windows",), stalls.empty_windows),
    Rule(("no-numbers",), stalls.no_metrics),
)
#: Findings of one status are shown in this order.
RULES: tuple[tuple[Rule, ...], ...] = (HANG, CAUSES, LIMITS, NOTES)
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
                steps = finding.steps if rule.advice is None else rule.advice(evidence, load)
                finding = _with_steps(finding, steps)
                stake = finding.at_stake or 0.0
            found.append(((_ORDER[finding.status], kind, -stake), finding))
    found.sort(key=lambda pair: pair[0])
    return tuple(finding for _, finding in found)


def _with_steps(finding: Finding, steps: tuple[Step, ...]) -> Finding:
    """Return a finding with its steps, the same steps as one text, and a rounded share."""
    texts = (f"{step.do} ({step.command})" if step.command else step.do for step in steps)
    stake = finding.at_stake
    return msgspec.structs.replace(
        finding,
        steps=steps,
        remedy="; ".join(texts) or None,
        at_stake=None if stake is None else round(min(1.0, max(0.0, stake)), 3),
    )
