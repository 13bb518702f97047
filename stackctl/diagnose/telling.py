"""How findings put numbers, and the commands that fit what is known of the stack."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stackctl.diagnose.findings import up_command
from stackctl.diagnose.load import Span
from stackctl.engines import engine as find_engine
from stackctl.engines import promised_context
from stackctl.engines.options import whole_argument
from stackctl.engines.protocol import Engine
from stackctl.values.diagnosis import Confidence, Evidence, Finding, Step
from stackctl.values.result import Status


def rate(value: float) -> str:
    """Tokens a second: a decimal below ten, where it matters."""
    return f"{value:.1f}" if round(value, 1) < 10 else f"{value:,.0f}"


def span(seen: Span, scale: float = 1.0) -> str:
    """``4.0-8.0``, or one number where both are the same."""
    low, high = seen.low * scale, seen.high * scale
    # With one kind of digits, as long as they mean something.
    digits = 1 if round(low, 1) < 10 and high < 100 else 0
    texts = [f"{value:,.{digits}f}" if digits else rate(value) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def seconds(value: float) -> str:
    """``0.21 s``, ``7.5 s``, ``30 s``."""
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def count(number: float, what: str) -> str:
    """``1 request``, ``2 requests``."""
    return f"{number:,.0f} {what}" + ("" if round(number) == 1 else "s")


def finding(
    name: str,
    status: Status,
    actual: str,
    *,
    expected: str | None = None,
    evidence: str | None = None,
    confidence: Confidence | None = None,
    steps: Sequence[Step] = (),
    effect: str | None = None,
    at_stake: float | None = None,
) -> Finding:
    """Make a finding; its remedy is its steps as one text."""
    made = Finding(
        name=name,
        status=status,
        expected=expected,
        actual=actual,
        evidence=evidence,
        confidence=confidence,
        effect=effect,
        at_stake=None if at_stake is None else round(min(1.0, max(0.0, at_stake)), 3),
    )
    return with_steps(made, steps)


def with_steps(finding: Finding, steps: Sequence[Step]) -> Finding:
    """Return a finding with steps to take; its remedy is the steps as one text."""
    texts = (f"{step.do} ({step.command})" if step.command else step.do for step in steps)
    remedy = "; ".join(texts) or None
    return msgspec.structs.replace(finding, steps=tuple(steps), remedy=remedy)


def up(evidence: Evidence, *settings: str) -> str:
    """The command that deploys this stack again with other settings, and all else as it was asked
    for; of a log alone, what to put there is not known."""
    return up_command(evidence.profile or "PROFILE", evidence.asked, *settings)


def on_gpu(evidence: Evidence) -> bool | None:
    """Whether it runs on a GPU; None where nobody says so."""
    if evidence.log is not None and evidence.log.place is not None:
        return evidence.log.place == "GPU"
    if evidence.plan is not None:
        return bool(evidence.plan.placement.gpus)
    return None


def engine_of(evidence: Evidence) -> Engine | None:
    """Return the engine of the plan, else of the log; None without both."""
    if evidence.plan is not None:
        return find_engine(evidence.plan.engine)
    return find_engine(evidence.log.engine) if evidence.log is not None else None


def argv_of(evidence: Evidence) -> tuple[str, ...]:
    """Return the planned arguments; none without a plan."""
    return evidence.plan.argv if evidence.plan is not None else ()


def context_tokens(evidence: Evidence) -> int | None:
    """Tokens that one request may use, as planned or as the log says."""
    if evidence.plan is not None:
        return promised_context(evidence.plan)
    return evidence.log.context if evidence.log is not None else None


def at_once(evidence: Evidence) -> int | None:
    """How many requests are served at the same time, as planned."""
    if evidence.plan is None:
        return None
    return whole_argument(evidence.plan.argv, find_engine(evidence.plan.engine).requests_option)


def threads_planned(evidence: Evidence) -> int | None:
    """Return the number of generating threads by the plan, else by the log."""
    if evidence.plan is None:
        return evidence.log.threads if evidence.log is not None else None
    option = threads_option(evidence)
    return whole_argument(evidence.plan.argv, option) if option else None


def threads_option(evidence: Evidence) -> str | None:
    """Return the option for the number of generating threads; None if the engine has none."""
    engine = engine_of(evidence)
    return engine.threads_options[0] if engine is not None and engine.threads_options else None


def rounded_context(tokens: int) -> int:
    """A context that holds a sequence of that length with a quarter to spare: whole 1,024."""
    return max(1024, -(-tokens * 5 // 4 // 1024) * 1024)
