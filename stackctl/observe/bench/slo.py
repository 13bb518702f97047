"""Judgement of measurements by a profile's SLO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from stackctl.diagnose.verify_results import sort_by_severity
from stackctl.quantity import format_number, format_share
from stackctl.values.bench import BenchCell, BenchClient, Workload
from stackctl.values.profile import Slo
from stackctl.values.result import Result, Status

#: Prompts up to _LONGER times the SLO's length count for its TTFT. If all of them are shorter than
#: _SHORTER times that length, they do not prove that the SLO is met.
_SHORTER, _LONGER = 0.9, 1.02
#: Remedies for missed objectives.
_REMEDIES = {
    "slo-ttft": "shorter prompts, a smaller model, or less at once; stackctl diagnose tells why",
    "slo-itl": "less at once, or a smaller or more quantised model",
    "slo-speed": "less at once, or a smaller or more quantised model",
    "slo-prefix": "keep system prompt and tool list the same in every request",
}
#: The remedy if the client is the limit.
_UNHURRIED = "fewer at once, or --with aiperf from a machine with free processors"


def slo_results(
    cells: Sequence[BenchCell], slo: Slo | None, *, slots: int, source: str,
    client: BenchClient | None = None, context: int | None = None,
) -> tuple[Result, ...]:  # fmt: skip
    """Return the results of a measurement, most important first.

    Cells with more requests at once than ``slots`` are not compared with the SLO. ``source`` is the
    origin of the figures for display, ``context`` the number of tokens that a request may have.
    """
    found = list(_failures(cells))
    if client is not None and client.limited:
        found.append(_limited(client))
    if slo is not None:
        served = [cell for cell in cells if cell.shape.concurrency <= slots]
        kept = filter(None, (rule(served, slo, source) for rule in _RULES))
        found += [_doubted(_possible(result, slo, context), slo, client) for result in kept]
    return sort_by_severity(found)


def compare_with_slo(
    name: str, allowed: float, seen: float | None, told: Callable[[float], str], *, source: str,
    most: bool, mark: str = "", at: str = "",
) -> Result:  # fmt: skip
    """Compare a measured value with an objective.

    Args:
        name: the name of the result.
        allowed: the limit of the objective.
        seen: the measured value; None: not measured.
        told: the function that formats a value.
        source: the origin of the value, as evidence.
        most: the limit is an upper bound; otherwise a lower bound.
        mark: the quantile, put before the values.
        at: the cell, put after the measured value.
    """
    expected = f"{mark}at {'most' if most else 'least'} {told(allowed)}"
    if seen is None:
        return Result(name=name, status="skip", expected=expected, actual="not measured",
            evidence=source, remedy="stackctl bench")  # fmt: skip
    well = seen <= allowed if most else seen >= allowed
    actual = told(seen)
    if not well and actual == told(allowed):
        # Rounding made the missed objective look like a kept one.
        actual = f"{'just over' if most else 'just under'} {actual}"
    return Result(
        name=name,
        status="ok" if well else "fail",
        expected=expected,
        actual=mark + actual + at,
        evidence=source,
        remedy=None if well else _REMEDIES.get(name.removesuffix("-engine")),
    )


def compare_latency(
    name: str, allowed: float, seen: float | None, unit: str, *, source: str, at: str = ""
) -> Result:
    """Compare the 95th percentile of a latency with its limit, both in ``unit``."""

    def told(value: float) -> str:
        return f"{format_number(value)} {unit}"

    return compare_with_slo(name, allowed, seen, told, source=source, most=True, mark="p95 ", at=at)


def workload_text(workload: Workload) -> str:
    """Return a cell's workload as text."""
    text = (
        f"{workload.prompt_tokens:,} in, {workload.output_tokens:,} out, {workload.concurrency} "
        f"at once"
    )
    return text + (", prefix cached" if workload.cached else "")


def _ttft(cells: Sequence[BenchCell], slo: Slo, source: str) -> Result | None:
    if slo.ttft_s is None:
        return None
    most = slo.prompt_tokens * _LONGER
    fair = [c for c in cells if c.ttft_s and not c.shape.cached and c.shape.prompt_tokens <= most]
    worst = max(fair, key=lambda cell: cell.ttft_s.p95 if cell.ttft_s else 0, default=None)
    seen = worst.ttft_s.p95 if worst and worst.ttft_s else None
    at = f" ({workload_text(worst.shape)})" if worst else ""
    result = compare_latency("slo-ttft", slo.ttft_s, seen, "s", source=source, at=at)
    longest = max((cell.shape.prompt_tokens for cell in fair), default=0)
    if result.status == "ok" and longest < slo.prompt_tokens * _SHORTER:
        told = f"not measured at the {slo.prompt_tokens:,} tokens that it promises"
        return Result(
            name=result.name, status="warn", expected=result.expected, actual=result.actual,
            evidence=told, remedy=f"stackctl bench --prompt {slo.prompt_tokens}",
        )  # fmt: skip
    return result


def _possible(result: Result, slo: Slo, context: int | None) -> Result:
    """Return the result, with another warning if the context cannot hold the SLO's prompt."""
    if (result.name, result.status) != ("slo-ttft", "warn") or not context:
        return result
    if context > slo.prompt_tokens:
        return result
    told = f"a context of {context:,} holds no prompt of the {slo.prompt_tokens:,} that it promises"
    remedy = "a larger context, or a smaller slo.prompt_tokens"
    return msgspec.structs.replace(result, evidence=told, remedy=remedy)


def _itl(cells: Sequence[BenchCell], slo: Slo, source: str) -> Result | None:
    if slo.itl_ms is None:
        return None
    seen, at = _worst(((c.itl_ms.p95, c) for c in cells if c.itl_ms), max)
    return compare_latency("slo-itl", slo.itl_ms, seen, "ms", source=source, at=at)


def _doubted(result: Result, slo: Slo, client: BenchClient | None) -> Result:
    """Return the result, as a warning if the client read so late that it proves nothing.

    Tokens that are read together seem to have arrived together.
    """
    late = client.lag_ms_p99 if client is not None and client.limited else None
    if (result.name, result.status) != ("slo-itl", "ok") or not late or late < (slo.itl_ms or 0):
        return result
    told = f"the client read {late:.1f} ms late (p99), more than the limit"
    return msgspec.structs.replace(result, status="warn", evidence=told, remedy=_UNHURRIED)


def _speed(cells: Sequence[BenchCell], slo: Slo, source: str) -> Result | None:
    if slo.min_tok_s is None:
        return None
    rows = ((c.generation_tok_s.p5, c) for c in cells if c.generation_tok_s)
    seen, at = _worst(rows, min)

    def told(value: float) -> str:
        return f"{format_number(value)} tok/s"

    return compare_with_slo(
        "slo-speed", slo.min_tok_s, seen, told, source=source, most=False, mark="p5 ", at=at
    )


def _prefix(cells: Sequence[BenchCell], slo: Slo, source: str) -> Result | None:
    if slo.min_prefix_hits is None:
        return None
    rows = (
        (c.cached_tokens / c.prompt_tokens, c)
        for c in cells
        if c.shape.cached and c.prompt_tokens and c.cached_tokens is not None
    )
    seen, at = _worst(rows, min)
    return compare_with_slo(
        "slo-prefix", slo.min_prefix_hits, seen, format_share, source=source, most=False, at=at
    )


_RULES = (_ttft, _itl, _speed, _prefix)


def _worst(
    rows: Iterable[tuple[float, BenchCell]], pick: Callable[..., tuple[float, BenchCell]]
) -> tuple[float | None, str]:
    found = list(rows)
    if not found:
        return None, ""
    value, cell = pick(found, key=lambda row: row[0])
    return value, f" ({workload_text(cell.shape)})"


def _failures(cells: Sequence[BenchCell]) -> Iterable[Result]:
    failed, asked = sum(cell.failed for cell in cells), sum(cell.requests for cell in cells)
    status: Status = "fail" if failed else "ok"
    notes = [note for cell in cells if cell.failed for note in cell.notes]
    yield Result(
        name="requests",
        status=status,
        expected="all answered",
        actual=f"{failed} of {asked} failed" if failed else f"{asked} answered",
        evidence=notes[0] if notes else None,
        remedy="stackctl logs" if failed else None,
    )


def _limited(client: BenchClient) -> Result:
    lag = "" if client.lag_ms_p99 is None else f", reads {client.lag_ms_p99:.1f} ms late (p99)"
    return Result(
        name="client",
        status="warn",
        expected="a client that waits for the engine",
        actual=f"used {format_share(client.cpu_share)} of a processor{lag}",
        evidence="the figures may be the client's limit, not the engine's",
        remedy=_UNHURRIED,
    )
