"""Intervals of 95 % around scores: over seeds, over rows, and of paired differences over both.

Two things vary when a method is compared with another: the training (another seed gives another student) and the rows that it is
asked (another test set would have others). An interval says only what it was computed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
# A bound moves by about 2 % of the interval's width between two draws of this many.
RESAMPLES = 10_000
# A table that is printed again is the same table.
_SEED = 0
# Rows of weights that are drawn at once, so that memory stays small for large sets.
_AT_ONCE = 1_000
# The draws for a set of at most this many rows are kept: 20 MB.
_FEW_ROWS = 1_000

Values = npt.NDArray[np.float64]
# A row is drawn once on average, and nowhere near 32,767 times.
Counts = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95 % interval, in the unit of the values; the bounds are NaN where nothing can be said."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there are bounds."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.known and (self.low > 0 or self.high < 0)


def over_seeds(values: Any) -> Interval:
    """Student's t interval of the mean of one value for each seed: mean ± t(n - 1) s / sqrt(n). One seed gives no bounds.

    It says what other seeds would give on the same rows, where their values are about normal. Source: Student 1908.
    """
    from scipy.stats import t

    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return Interval(float(found.mean()), float("nan"), float("nan"))
    half = float(t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(float(found.mean()), float(found.mean()) - half, float(found.mean()) + half)


def over_rows(values_SR: Any) -> Interval:
    """The percentile bootstrap of the mean over rows, whose seeds are taken as they are; values are (seeds, rows).

    It says what other rows of the same kind would give for the same students. Source: Efron 1979.
    """
    values_SR = np.atleast_2d(np.asarray(values_SR, dtype=np.float64))
    return _bootstrap(values_SR, resample_seeds=False)


def over_rows_and_seeds(values_SR: Any) -> Interval:
    """The percentile bootstrap of the mean over rows and seeds, both resampled with replacement; values are (seeds, rows).

    For a paired difference, values are the method's minus the baseline's on the same row under the same seed. With one seed only
    rows are resampled. With few seeds the interval is too narrow: drawing n of n understates the variance over seeds by
    (n - 1) / n. Source: the pigeonhole bootstrap, Owen 2007.
    """
    values_SR = np.atleast_2d(np.asarray(values_SR, dtype=np.float64))
    return _bootstrap(values_SR, resample_seeds=len(values_SR) > 1)


def _bootstrap(values_SR: Values, *, resample_seeds: bool) -> Interval:
    mean = float(values_SR.mean())
    seeds, rows = values_SR.shape
    if rows < 2:
        return Interval(mean, float("nan"), float("nan"))
    draws = _kept_draws if rows <= _FEW_ROWS else _draws
    means = [
        ((seeds_BS / seeds @ values_SR) * (rows_BR / rows)).sum(axis=1)
        for rows_BR, seeds_BS in draws(rows, seeds, resample_seeds)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def _draws(rows: int, seeds: int, resample_seeds: bool) -> Iterator[tuple[Counts, Counts]]:
    """How often each row and each seed was drawn, which says all about a resample; `_AT_ONCE` of them at a time."""
    generator = np.random.default_rng(_SEED)
    for _ in range(0, RESAMPLES, _AT_ONCE):
        rows_BR = generator.multinomial(rows, np.full(rows, 1 / rows), size=_AT_ONCE).astype(np.int16)
        seeds_BS = np.ones((_AT_ONCE, seeds), dtype=np.int16)
        if resample_seeds:
            seeds_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=_AT_ONCE).astype(np.int16)
        yield rows_BR, seeds_BS


@lru_cache(maxsize=4)
def _kept_draws(rows: int, seeds: int, resample_seeds: bool) -> list[tuple[Counts, Counts]]:
    """The same, kept: a table has many intervals of as many rows, and the draws are nearly all of their cost."""
    return [*_draws(rows, seeds, resample_seeds)]
