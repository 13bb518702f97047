"""Quantiles, and the shift between two samples with its interval. Pure Python, no assumption on how
the values are distributed (docs/decisions/0013-measuring.md)."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

from stackctl.values.bench import Quantiles

#: The two-sided level of intervals.
LEVEL = 0.95
#: Up to so many values each, the distribution of the rank sum is counted; above, it is normal.
_EXACT = 25


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of a sample by linear interpolation (type 7 of Hyndman and Fan, 1996)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """The summary of a sample; None of an empty one."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Quantiles(
        n=len(ordered),
        mean=statistics.fmean(ordered),
        p5=quantile(ordered, 0.05),
        p50=quantile(ordered, 0.5),
        p95=quantile(ordered, 0.95),
        p99=quantile(ordered, 0.99),
    )


def ratio(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float] | None:
    """By what factor ``after`` is larger than ``before``: estimate, low, high.

    Hodges and Lehmann's estimate of a shift (1963) between the logarithms, with the interval that
    belongs to the test of Mann and Whitney (1947): it holds 1 exactly where that test finds no
    difference. None when there are too few values for an interval (under 4 each), or some are not
    above zero.
    """
    m, n = len(before), len(after)
    if m == 0 or n == 0 or min(*before, *after) <= 0:
        return None
    drop = _critical(m, n)
    if drop is None:
        return None
    pairs = sorted(math.log(b) - math.log(a) for a in before for b in after)
    return (
        math.exp(statistics.median(pairs)),
        math.exp(pairs[drop]),
        math.exp(pairs[m * n - 1 - drop]),
    )


def _critical(m: int, n: int) -> int | None:
    """How many of the ordered pairs lie outside the interval on either side; None: not even the
    whole range has the level."""
    tail = (1 - LEVEL) / 2
    if m <= _EXACT and n <= _EXACT:
        counts = _rank_sums(m, n)
        allowed, seen = tail * math.comb(m + n, m), 0
        for value, count in enumerate(counts):
            seen += count
            if seen > allowed:
                return value - 1 if value else None
    deviation = math.sqrt(m * n * (m + n + 1) / 12)
    z = statistics.NormalDist().inv_cdf(1 - tail)
    drop = math.floor(m * n / 2 - z * deviation - 0.5)
    return drop if drop >= 0 else None


@functools.cache
def _rank_sums(m: int, n: int) -> tuple[int, ...]:
    """How many of the orders of m and n values have each value of Mann and Whitney's U."""
    # The number of partitions into at most m parts of at most n each (Gaussian coefficients).
    counts = [1] + [0] * (m * n)
    for part in range(1, m + 1):
        top = n + part
        for value in range(m * n, top - 1, -1):
            counts[value] -= counts[value - top]
        for value in range(part, m * n + 1):
            counts[value] += counts[value - part]
    return tuple(counts)
