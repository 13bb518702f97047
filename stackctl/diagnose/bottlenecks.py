"""Limits of requests: generation, prompts, waiting, the KV cache, and needless computation."""

from __future__ import annotations

from stackctl.diagnose import remedies
from stackctl.diagnose.load_summary import LoadSummary
from stackctl.diagnose.results import (
    cleared,
    format_count,
    format_rate,
    format_seconds,
    format_value_range,
)
from stackctl.quantity import format_number, format_share
from stackctl.values.diagnosis import Evidence, Finding

#: The default goal. It lies between the owner's set-ups that were viable (10-37, 25-28 tok/s) and
#: the one that was not (0.6-8).
WANTED_TOK_S = 10.0
#: The default goal: the SLO of the owner's production profile, for prompts of 4,640 tokens.
WANTED_TTFT_S = 5.0
#: The default goal: the owner's for agents.
WANTED_HITS = 0.60
#: A speed below this share of the planned range's low end is slower than planned.
_BELOW_PLAN = 0.8
_MUCH_WAITING, _MUCH_QUEUE, _MUCH_PROMPT = 0.5, 0.25, 0.5
#: Shorter prompts have little to find in the cache (a block has 16 tokens, on a CPU 128).
_SHORT_PROMPT = 200
#: An answer of so many tokens takes about 30 s at the production set-up's speed.
_LONG_ANSWER, _FEW_ANSWERS = 800, 3
_MUCH_CONTEXT = 4
#: If the ends of a span differ by more than this factor, the typical value is shown instead.
_WIDE = 4


def slow_decode(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find generation that is slower than wanted or than planned."""
    seen = load.generation
    if seen is None:
        return None
    wanted, why = _wanted_speed(evidence)
    planned = _planned_speed(evidence, load)
    slow = wanted is not None and seen.typical < wanted
    below = planned is not None and seen.typical < _BELOW_PLAN * planned[0]
    text = f"{format_value_range(seen)} tok/s"
    if not slow and not below:
        wide = seen.high > _WIDE * seen.low
        usual = f"typically {format_rate(seen.typical)} tok/s" if wide else text
        return cleared("decode-bound", f"{usual} a request", expected=why)
    share_of_prompts = load.prompt_share or 0.0
    if not load.apart and share_of_prompts >= _MUCH_PROMPT:
        return None  # prompts between the tokens explain the speed as well
    requests = format_count(max(1.0, load.concurrency or 1.0), "request")
    facts = [f"typically {format_rate(seen.typical)} tok/s"]
    if load.prompt_share is not None:
        most = "at most " if load.at_most else ""
        facts.append(f"prompts took {most}{format_share(load.prompt_share)} of the time")
    if planned is not None:
        says = f"{format_rate(planned[0])}-{format_rate(planned[1])} tok/s"
        facts.append(
            f"planned were {says}"
            if below
            else f"the plan expects {says}: that is the model and this machine, not a setting"
        )
    few, many = (tokens / seen.typical for tokens in (200, 800))
    return Finding(
        name="decode-bound",
        status="fail" if slow else "warn",
        actual=f"generation is the limit: {text} for {requests}",
        expected=why if slow else "the planned speed",
        evidence="; ".join(facts),
        confidence="high" if load.apart and load.generation_samples >= 2 else "medium",
        effect=f"at this speed an edit of 200 tokens takes {format_seconds(few)}, "
        f"a file of 800 {format_seconds(many)}",
        at_stake=1 - share_of_prompts,
    )


def _wanted_speed(evidence: Evidence) -> tuple[float | None, str | None]:
    """Return the wanted tokens per second of one request, with its source as text.

    Both are None if the objective is throughput and the SLO sets no speed.
    """
    slo = evidence.slo
    asked = []
    if slo is not None and slo.min_tok_s is not None:
        asked.append((slo.min_tok_s, f"at least {slo.min_tok_s:g} tok/s (profile)"))
    if slo is not None and slo.itl_ms is not None:
        speed = 1000 / slo.itl_ms
        asked.append(
            (speed, f"at least {format_number(speed)} tok/s ({slo.itl_ms:g} ms a token, profile)")
        )
    if asked:
        return max(asked)
    if evidence.plan is not None and evidence.plan.objective == "throughput":
        return None, None
    return WANTED_TOK_S, f"at least {WANTED_TOK_S:g} tok/s"


def _planned_speed(evidence: Evidence, load: LoadSummary) -> tuple[float, float] | None:
    """Return the planned range; None if several requests ran, because it is for a single one."""
    if evidence.plan is None or (load.concurrency or 1) > 1:
        return None
    return evidence.plan.prediction.decode_tok_s


def slow_prefill(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find prompts that take most of the time, or longer than the SLO allows."""
    if load.prompt_share is None:
        return None
    wanted = _wanted_ttft_s(evidence)
    much = load.prompt_share >= _MUCH_PROMPT
    late = load.ttft_s is not None and load.ttft_s > wanted
    missed = late and _is_promised(evidence, load)
    if not (missed or (much and (late or _crawls(load)))):
        few = load.all_prompt_tokens is not None and load.all_prompt_tokens < _SHORT_PROMPT
        if load.prompt is None or few or (late and not much):
            return None
        # Averages include time without prompts, so the highest is the nearest to the true speed.
        return cleared("prefill-bound", f"{format_rate(load.prompt.high)} tok/s")
    speed = f"{format_value_range(load.prompt)} tok/s" if load.prompt else "unknown speed"
    return Finding(
        name="prefill-bound",
        status="fail" if missed else "warn",
        actual=f"prompts are the limit: {speed}"
        if much
        else f"the first token comes late: prompts at {speed}",
        expected=f"first token within {format_seconds(wanted)}",
        evidence="; ".join(_facts_of_prompts(evidence, load, load.prompt_share)),
        confidence="medium" if load.at_most else "high",
        effect="half the prompt, or half of it cached, is half the wait",
        at_stake=load.prompt_share,
    )


def _wanted_ttft_s(evidence: Evidence) -> float:
    slo = evidence.slo
    return slo.ttft_s if slo is not None and slo.ttft_s is not None else WANTED_TTFT_S


def _is_promised(evidence: Evidence, load: LoadSummary) -> bool:
    """Return True if the SLO covers the first token of such prompts and a queue explains no delay.

    Waiting for other requests has a rule of its own.
    """
    slo = evidence.slo
    if slo is None or slo.ttft_s is None or (load.prompt_tokens or 0) > slo.prompt_tokens:
        return False
    return (load.queue_share or 0.0) < _MUCH_QUEUE


def _crawls(load: LoadSummary) -> bool:
    """Return True if answers are slow while prompts are computed.

    This applies only to evidence without the times of prompts.
    """
    if load.ttft_s is not None or load.apart or load.generation is None:
        return False
    return load.generation.typical < WANTED_TOK_S


def _facts_of_prompts(evidence: Evidence, load: LoadSummary, share: float) -> list[str]:
    facts = [f"they took {'at most ' if load.at_most else ''}{format_share(share)} of the time"]
    if load.ttft_s is not None:
        alone = " without waiting" if load.ttft_computed else ""
        facts.append(f"95 % had the first token within {format_seconds(load.ttft_s)}{alone}")
    if load.prompt_tokens:
        facts.append(f"{load.prompt_tokens:,.0f} tokens each")
    if evidence.plan is not None and (planned := evidence.plan.prediction.prefill_tok_s):
        facts.append(f"planned were {format_rate(planned[0])}-{format_rate(planned[1])} tok/s")
    return facts


def long_queue(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find requests that wait for other requests."""
    if load.waiting_most is None and load.queue_share is None:
        return None
    most, share = load.waiting_most or 0, load.queue_share or 0.0
    often = (load.waiting_share or 0.0) >= _MUCH_WAITING and most > 0
    if not often and share < _MUCH_QUEUE:
        return cleared("queueing", f"{most} waiting at most" if most else "0 waiting")
    facts = []
    if often:
        facts.append(f"somebody waited at {format_share(load.waiting_share or 0.0)} of the looks")
    if share >= _MUCH_QUEUE:
        facts.append(f"waiting was {format_share(share)} of the time of requests")
    if load.kv_most is not None:
        facts.append(f"the KV cache was {format_share(load.kv_most)} full at most")
    return Finding(
        name="queueing",
        status="warn",
        actual=f"requests wait for others: {most} waiting at most"
        if most
        else f"requests waited for others {format_share(share)} of their time",
        expected="0 waiting",
        evidence="; ".join(facts),
        confidence="high",
        effect="waiting turns into working side by side, while memory has room",
        at_stake=load.queue_share if load.queue_share is not None else load.waiting_share,
    )


def kv_cache_pressure(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find a KV cache that is full, or preempted requests, which were computed again."""
    if load.kv_most is None and not load.preemptions:
        return None
    full = remedies.is_full(load)
    at_most = f"{format_share(load.kv_most)} at most" if load.kv_most is not None else "unknown"
    if evidence.now is not None and "kv_usage" in evidence.now.estimates:
        at_most += ", an estimate"
    if not full and not load.preemptions:
        return cleared("kv-pressure", at_most)
    again = format_count(load.preemptions or 0, "request") + " thrown out and computed again"
    return Finding(
        name="kv-pressure",
        status="fail" if load.preemptions else "warn",
        actual=f"the KV cache is too small: {again if load.preemptions else at_most}",
        expected=f"under {format_share(remedies.FULL)}, none thrown out",
        evidence=f"KV cache {at_most}; {again}",
        confidence="high",
        effect="what is thrown out is computed twice, from its first token",
        at_stake=0.5 if load.preemptions else 0.2,
    )


def prefix_cache_misses(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find a low hit rate of the prefix cache."""
    if load.hits is None or not load.busy:
        return None
    slo = evidence.slo
    wanted = WANTED_HITS if slo is None or slo.min_prefix_hits is None else slo.min_prefix_hits
    wide = load.hits.high > _WIDE * load.hits.low
    seen = format_share(load.hits.typical) if wide else f"{format_value_range(load.hits, 100)} %"
    if load.hits.typical >= wanted:
        return cleared("prefix-cache-misses", seen)
    if load.hits.high == 0 and (load.all_prompt_tokens or 0.0) < _SHORT_PROMPT:
        return None  # a few short first requests
    if load.prompt_tokens is not None and load.prompt_tokens < _SHORT_PROMPT:
        return cleared(
            "prefix-cache-misses", f"prompts of {load.prompt_tokens:.0f} tokens need none"
        )
    missed = (wanted - load.hits.typical) / (1 - load.hits.typical)
    why = ": every prompt starts differently" if load.hits.high < 0.2 else ""
    return Finding(
        name="prefix-cache-misses",
        status="warn",
        actual=f"prefix cache hits {seen}, wanted {format_share(wanted)}{why}",
        expected=f"at least {format_share(wanted)}",
        evidence=f"{format_share(load.hits.typical)} of the prompts' tokens in the end",
        confidence="high",
        effect=f"at {format_share(wanted)} prompts would compute {format_share(missed)} fewer "
        "tokens",
        at_stake=missed * (load.prompt_share if load.prompt_share is not None else 0.2),
    )


def long_answers(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find long answers, such as edits of whole files."""
    if load.answer_tokens is None or (load.requests or 0) < _FEW_ANSWERS:
        return None
    text = f"{load.answer_tokens:,.0f} tokens on average"
    if load.answer_tokens < _LONG_ANSWER:
        return cleared("whole-file-edits", text)
    took = ""
    if load.generation is not None:
        took = f", {format_seconds(load.answer_tokens / load.generation.typical)} each"
    return Finding(
        name="whole-file-edits",
        status="warn",
        actual=f"answers are long: {text}{took}",
        expected=f"under {_LONG_ANSWER} tokens",
        evidence=f"{format_count(load.requests or 0, 'answer')}; whole files, or long reasoning",
        confidence="medium",
        effect="time goes down with the tokens: a diff is a fraction of its file",
        at_stake=(1 - (load.prompt_share or 0.0)) * (1 - _LONG_ANSWER / 2 / load.answer_tokens),
    )


def oversized_context(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find a context that is far larger than the longest sequence."""
    room, longest = remedies.context_tokens(evidence), load.longest
    if room is None or longest is None or (load.requests or 0) < remedies.ENOUGH_REQUESTS:
        return None
    fits = remedies.rounded_context(longest)
    if fits * _MUCH_CONTEXT > room:
        return cleared("context-oversized", f"{longest:,} of {room:,} tokens used")
    return Finding(
        name="context-oversized",
        status="warn",
        actual=f"context for {room:,} tokens, the longest request had {longest:,}",
        expected=f"about {fits:,}",
        evidence=f"{format_count(load.requests or 0, 'request')}",
        confidence="medium",
        effect="memory for more requests at once; one alone is not faster",
        at_stake=0.02,
    )
