"""Rules for counters that do not move: no requests, a window's timing, a long prompt, or a hang."""

from __future__ import annotations

from stackctl.diagnose.load_summary import LoadSummary
from stackctl.diagnose.results import format_count, format_seconds
from stackctl.values.diagnosis import Evidence, Finding, Step
from stackctl.values.metrics import EngineMetrics, is_working

#: An engine hangs if no counter moves for so long while a request runs. Engines count a prompt when
#: it is done, and 30,000 tokens take 13-27 s at the 1,100-2,300 tok/s of the reference box.
HANG_S = 30.0


def counters_unchanged(before: EngineMetrics, now: EngineMetrics) -> bool | None:
    """Return True if requests run and no counter moved between two readings.

    Return None if the engine reports no counters or no number of running requests.
    """
    pairs = zip(before.counters, now.counters, strict=True)
    known = [(one, two) for one, two in pairs if one is not None and two is not None]
    if not known or before.running is None or now.running is None:
        return None
    return before.running > 0 and now.running > 0 and all(one == two for one, two in known)


def hang(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find an engine that hangs: requests run, no counter moves, and it uses no CPU time."""
    if evidence.late:
        return _mute(evidence)
    if evidence.before is None or evidence.now is None or not evidence.interval_s:
        return None
    if not counters_unchanged(evidence.before, evidence.now):
        return None
    requests = format_count(evidence.now.running or 0, "request")
    for_s = format_seconds(evidence.interval_s)
    cpu = evidence.cpu
    works = cpu is not None and is_working(cpu.ran_s, cpu.interval_s)
    if works or cpu is None or evidence.interval_s < HANG_S - 1:
        used = f", but it used {cpu.ran_s:.1f} s of processor time" if cpu and works else ""
        text = f"{requests} running and no counter moved in {for_s}{used}: "
        text += "a long prompt is counted when it is done"
        return Finding(name="standing-still", status="info", actual=text)
    return _hangs(evidence, f"{requests} running, and no counter moved in {for_s}")


def _mute(evidence: Evidence) -> Finding | None:
    """Find a hang of an engine that did not report its counters.

    An engine that computes a long prompt does not report them in time either, but uses CPU time.
    """
    cpu = evidence.cpu
    if cpu is None or not cpu.threads or is_working(cpu.ran_s, cpu.interval_s):
        return None
    return _hangs(evidence, f"it did not tell its numbers in {format_seconds(cpu.interval_s)}")


def _hangs(evidence: Evidence, what: str) -> Finding:
    cpu = evidence.cpu
    assert cpu is not None
    return Finding(
        name="hang",
        status="fail",
        actual=f"it hangs: {what}",
        expected="counters that move",
        evidence=f"{cpu.ran_s:.2f} s of processor time in {format_seconds(cpu.interval_s)}",
        confidence="medium",
        steps=(
            Step(do="keep its log", command=f"stackctl logs {evidence.stack} -n 1000 >log"),
            Step(do="start it again", command=f"stackctl restart {evidence.stack}"),
        ),
        effect="requests that run are lost",
        at_stake=1.0,
    )


def idle_windows(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Note windows at 0 tok/s without a request."""
    windows = evidence.log.windows if evidence.log else ()
    if not any(w.running == 0 and w.waiting == 0 for w in windows):
        return None
    return Finding(
        name="idle",
        status="info",
        actual="windows with 0 running requests are idle time, not stalls",
    )


def empty_windows(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Note windows at 0 tok/s while requests ran, with the number of such windows in a row."""
    windows = evidence.log.windows if evidence.log else ()
    longest = run = 0
    for window in windows:
        empty = window.running > 0 and window.prompt_tok_s == window.generation_tok_s == 0
        run = run + 1 if empty else 0
        longest = max(longest, run)
    if not longest:
        return None
    why = "the window's timing, not a hang"
    if longest >= 3:
        why = "stackctl diagnose STACK reads its counters, and tells a hang from a long prompt"
    count = format_count(longest, "window")
    text = f"0 tok/s with a request running, for {count} in a row at most: {why}"
    return Finding(name="empty-windows", status="info", actual=text)


def no_metrics(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Note that the engine reported no metrics, or not in time."""
    if evidence.late:
        if _mute(evidence) is not None:
            return None
        text = "it did not tell its numbers in time: a batch of a long prompt takes that long; "
        text += "stackctl check asks once more"
    elif evidence.stack is not None and evidence.now is None:
        text = "it tells no numbers at /metrics: its log alone was read"
    else:
        return None
    return Finding(name="no-numbers", status="info", actual=text)
