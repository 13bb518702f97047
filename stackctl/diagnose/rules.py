"""The table of all findings of ``stackctl diagnose``. Add a new finding here.

A rule is a function of the evidence and the load. It returns a finding, clears its subject (status
ok), or returns None if the evidence proves neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stackctl.diagnose import bottlenecks, causes, remedies, stalls
from stackctl.diagnose.load_summary import LoadSummary
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
