"""Numbers and commands in the text of findings, and facts of the evidence that they need."""

from __future__ import annotations

from stackctl.diagnose.load_summary import ValueRange
from stackctl.diagnose.verify_results import deploy_command
from stackctl.engines import context_per_request, planned_threads
from stackctl.engines import engine as find_engine
from stackctl.engines.options import int_option_in_argv
from stackctl.engines.protocol import Engine
from stackctl.values.diagnosis import Evidence, Finding


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
    """Return the result of a rule that rules its cause out."""
    return Finding(name=name, status="ok", actual=actual, expected=expected)


def deploy_with_settings(evidence: Evidence, *settings: str) -> str:
    """Return the command that deploys this stack again with new settings (KEY=VALUE).

    Other settings stay as in the earlier command. For a log without a stack the command contains
    the placeholder PROFILE.
    """
    return deploy_command(evidence.profile or "PROFILE", evidence.asked, *settings)


def runs_on_gpu(evidence: Evidence) -> bool | None:
    """Return True if the engine runs on a GPU; None if neither log nor plan shows it."""
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
    """Return the tokens that one request may use, by the plan, else by the log; None: unknown."""
    if evidence.plan is not None:
        return context_per_request(evidence.plan)
    return evidence.log.context if evidence.log is not None else None


def concurrency(evidence: Evidence) -> int | None:
    """Return the planned number of requests at the same time; None without a plan or an option."""
    if evidence.plan is None:
        return None
    return int_option_in_argv(evidence.plan.argv, find_engine(evidence.plan.engine).requests_option)


def generating_threads(evidence: Evidence) -> int | None:
    """Return the number of generating threads by the plan, else by the log; None: unknown."""
    if evidence.plan is None:
        return evidence.log.threads if evidence.log is not None else None
    return planned_threads(evidence.plan)


def threads_option(evidence: Evidence) -> str | None:
    """Return the option for the number of generating threads; None if the engine has none."""
    engine = engine_of(evidence)
    return engine.threads_options[0] if engine is not None and engine.threads_options else None


def rounded_context(tokens: int) -> int:
    """Return a context that is a quarter larger than a sequence, rounded up to 1,024 tokens."""
    return max(1024, -(-tokens * 5 // 4 // 1024) * 1024)
