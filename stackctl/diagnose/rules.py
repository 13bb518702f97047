"""The table of all findings of ``stackctl diagnose``. Add a new finding here.

A rule is a function of the evidence and the load. It returns a finding, clears its subject (status
ok), or returns None if the evidence proves neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stackctl.diagnose import causes, limits, remedies, stillness
from stackctl.diagnose.load import Load
from stackctl.values.diagnosis import Evidence, Finding, Step


@dataclass(frozen=True)
class Rule:
    """One row of the table: the names of a rule's findings, the rule, and the steps against them.

    ``advice`` is None if the steps depend on details of the finding; such a rule sets them itself.
    """

    names: tuple[str, ...]
    check: Callable[[Evidence, Load], Finding | None]
    advice: Callable[[Evidence, Load], tuple[Step, ...]] | None = None


#: A hang hides all other findings.
HANG = (Rule(("hang", "standing-still"), stillness.hang),)
#: Faults of the machine or of the launch explain slow numbers, so they come before them.
CAUSES = (
    Rule(("cpu-fallback",), causes.cpu_fallback),
    Rule(("oversubscribed-threads",), causes.threads),
    Rule(("page-cache-misplacement",), causes.pages),
    Rule(("thermal-limit", "power-limit"), causes.throttled),
)
#: Limits of the speed of requests.
LIMITS = (
    Rule(("decode-bound",), limits.decode, remedies.slow_generation),
    Rule(("prefill-bound",), limits.prefill, remedies.slow_prompts),
    Rule(("queueing",), limits.queueing, remedies.long_queue),
    Rule(("kv-pressure",), limits.kv, remedies.full_cache),
    Rule(("prefix-cache-misses",), limits.prefix, remedies.same_beginning),
    Rule(("whole-file-edits",), limits.answers, remedies.long_answers),
    Rule(("loop-model",), causes.loop_model),
    Rule(("context-oversized",), limits.context, remedies.oversized_context),
)
#: Notes on numbers that look like faults but are not faults.
NOTES = (
    Rule(("idle",), stillness.idle),
    Rule(("empty-windows",), stillness.empty_windows),
    Rule(("no-numbers",), stillness.silent),
)
#: Findings of one status are shown in this order.
RULES: tuple[tuple[Rule, ...], ...] = (HANG, CAUSES, LIMITS, NOTES)
