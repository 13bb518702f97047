"""Quantiles and intervals against known values and by what they promise."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackctl.observe.bench.statistics import quantile, quantiles, ratio
from stackctl.values.bench import ComparisonVerdict


def test_quantiles_are_linear_between_values() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([1, 2, 3, 4, 5], 0.95) == pytest.approx(4.8)
    assert quantile([7], 0.99) == 7
    assert quantiles([]) is None
    found = quantiles([2.0, 4.0])
    assert found is not None
    assert (found.n, found.mean, found.p50) == (2, 3.0, 3.0)


@given(st.lists(st.floats(0.001, 1e6), min_size=2, max_size=60), st.floats(0, 1))
def test_quantiles_as_the_standard_library_has_them(values: list[float], share: float) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert quantile(values, 0.95) == pytest.approx(cuts[94])
    assert min(values) <= quantile(values, share) <= max(values)


def test_few_values_have_no_interval() -> None:
    assert ratio([1, 2, 3], [4, 5, 6]) is None
    assert ratio([1.0] * 4, [2.0] * 4) is not None
    assert ratio([], [1.0]) is None
    assert ratio([1.0] * 5, [0.0, 1.0, 1.0, 1.0, 1.0]) is None


@pytest.mark.parametrize(("n", "critical"), [(4, 0), (5, 2), (8, 13), (10, 23), (20, 127)])
def test_the_interval_is_that_of_mann_and_whitney(n: int, critical: int) -> None:
    """Two-sided 5 % critical values of U from published tables: with so many pairs the other way
    round there is a difference, with one more there is none."""
    for swapped, different in ((critical, True), (critical + 1, False)):
        before = [float(value) for value in range(1, n + 1)]
        # Values of "after" above all of "before", each lowered over as many as are to be swapped.
        after, left = [], swapped
        for number in range(n):
            over = min(n, left)
            left -= over
            after.append(n - over + 0.5 + 0.001 * number)
        pairs = sum(b < a for a in before for b in after)
        assert pairs == swapped
        found = ratio(before, after)
        assert found is not None
        assert (found[1] > 1) is different


@given(st.integers(4, 12), st.integers(4, 12), st.floats(0.1, 10), st.integers(0, 9999))
def test_a_factor_is_found_and_lies_within_its_interval(
    m: int, n: int, factor: float, seed: int
) -> None:
    noise = random.Random(seed)
    before = [math.exp(noise.gauss(0, 0.01)) for _ in range(m)]
    after = [factor * math.exp(noise.gauss(0, 0.01)) for _ in range(n)]
    found = ratio(before, after)
    assert found is not None
    middle, low, high = found
    assert low <= middle <= high
    assert middle == pytest.approx(factor, rel=0.05)
    back = ratio(after, before)
    assert back is not None
    assert back == pytest.approx((1 / middle, 1 / high, 1 / low))


def test_equal_samples_are_rarely_called_different() -> None:
    """95 %: of 400 pairs of samples of one distribution about 20 may differ, in this seed too."""
    noise, wrong = random.Random(1), 0
    for m, n in itertools.islice(itertools.cycle([(5, 5), (10, 6), (30, 40), (26, 12)]), 400):
        found = ratio(*([noise.lognormvariate(0, 1) for _ in range(size)] for size in (m, n)))
        assert found is not None
        wrong += not found[1] <= 1 <= found[2]
    assert wrong <= 32


@pytest.mark.parametrize(
    ("factor", "more_is_better", "expected"),
    [
        (None, True, "too few"),
        ((1.10, 1.05, 1.15), True, "better"),
        ((1.10, 1.05, 1.15), False, "worse"),
        ((0.90, 0.85, 0.95), True, "worse"),
        ((0.90, 0.85, 0.95), False, "better"),
        ((1.10, 0.95, 1.25), True, "no difference"),
        # Sure, but too small to matter.
        ((1.01, 1.005, 1.015), True, "no difference"),
    ],
)
def test_verdicts(
    factor: tuple[float, float, float] | None, more_is_better: bool, expected: ComparisonVerdict
) -> None:
    from stackctl.observe.bench.compare import verdict_on_factor

    assert verdict_on_factor(factor, more_is_better=more_is_better) == expected
