"""Quantiles, and the ratio of two samples with its interval.

The methods assume nothing about the distribution of the values (docs/decisions/0013-measuring.md).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

from stackctl.values.bench import Quantiles

#: The two-sided confidence level of intervals.
LEVEL = 0.95
#: The distribution of the rank sum is exact up to so many values in each sample; above that, the
#: normal approximation is used.
_EXACT = 25


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of a sample by linear interpolation (type 7 of Hyndman and Fan, 1996)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """Return the summary of a sample; None if it is empty."""
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
    """Return the ratio of ``after`` to ``before`` as (estimate, low, high).

    The estimate is that of Hodges and Lehmann (1963) for a shift between the logarithms. The
    interval belongs to the test of Mann and Whitney (1947): it contains 1 exactly if that test
    finds no difference. Return None if there are too few values for an interval (under 4 each), or
    if values are not above zero.
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
    """Return the number of ordered pairs outside the interval on either side.

    Return None if even the whole range does not reach the confidence level.
    """
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
    """Return, for each value of Mann and Whitney's U, the number of orders of m and n values."""
    # These are the numbers of partitions into at most m parts of at most n (Gaussian coefficients).
    counts = [1] + [0] * (m * n)
    for part in range(1, m + 1):
        top = n + part
        for value in range(m * n, top - 1, -1):
            counts[value] -= counts[value - top]
        for value in range(part, m * n + 1):
            counts[value] += counts[value - part]
    return tuple(counts)
