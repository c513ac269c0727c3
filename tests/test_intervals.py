"""Intervals around scores, held to scipy's and to resampling by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from switchkd.evaluation.intervals import Interval, over_rows, over_rows_and_seeds, over_seeds


def scores(seeds: int, rows: int, seed: int = 0) -> np.ndarray:
    """Exact matches whose chance depends on row and seed, 0 or 100, (seeds, rows)."""
    generator = np.random.default_rng(seed)
    chance = 0.5 + 0.1 * generator.standard_normal((seeds, 1)) + 0.2 * generator.standard_normal((1, rows))
    return 100.0 * (generator.random((seeds, rows)) < chance)


def test_over_seeds_is_the_t_interval() -> None:
    values = [58.0, 57.2, 60.1, 55.9, 58.8]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.mean == pytest.approx(58.0)
    assert not over_seeds([58.0]).known


def test_over_rows_is_the_percentile_bootstrap() -> None:
    values = scores(1, 200)[0]
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    found = over_rows(values)
    # A 2.5 % quantile of 10,000 draws has a deviation of 0.027 of the means', here 3.5; five times that of both.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.7)
    assert found.mean == pytest.approx(values.mean())


def test_over_rows_and_seeds_resamples_both() -> None:
    values = scores(5, 60)
    generator = np.random.default_rng(1)
    means = []
    for _ in range(4000):
        seeds, rows = generator.integers(5, size=5), generator.integers(60, size=60)
        means.append(values[np.ix_(seeds, rows)].mean())
    expected = np.quantile(means, [0.025, 0.975])
    found = over_rows_and_seeds(values)
    # As above: the means' deviation is about 6, and this loop draws 4,000 times.
    assert (found.low, found.high) == pytest.approx(expected, abs=1.5)
    alone = over_rows(values)
    assert found.high - found.low > 1.1 * (alone.high - alone.low)
    assert over_rows_and_seeds(values[:1]) == over_rows(values[:1])
    assert over_rows_and_seeds(values) == found


def test_an_interval_says_whether_zero_is_outside() -> None:
    assert Interval(2.0, 0.5, 3.5).excludes_zero
    assert Interval(-2.0, -3.5, -0.5).excludes_zero
    assert not Interval(2.0, -0.5, 4.5).excludes_zero
    assert not over_rows([7.0]).excludes_zero
