"""Release: the loss ends where the teacher no longer tells the student's candidates apart.

Shape letters: B rows, T positions, S segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.loss.weight import Weight
from switchkd.records import Batch
from switchkd.settings.components import setting


@dataclass(frozen=True)
class Release(Weight):
    """1 up to the place where the teacher's margin drops for good, and 0 behind it; 1 at the data set's text.

    The margin at a token is what the teacher's favorite among the student's `top_k` likeliest tokens has over the next of
    them, in nats. Its means over segments of `segment_tokens` tokens are a series; where one drop in its mean explains it
    better than none (by the Bayesian information criterion), nothing counts from the drop on. The loss is divided by the
    number of tokens that count.

    Source: arXiv 2605.13643, of which we could read only the abstract. Margin, criterion and both defaults are our reading of
    it. We depart in the segments: the paper's are sentences. Raises UserError for values out of range.
    """

    top_k: int = setting(16, "The number of the student's likeliest tokens that the margin is taken over.")
    segment_tokens: int = setting(8, "The number of tokens that a mean of the margin is taken over.")
    reads_logp: ClassVar[bool] = True
    of_rollouts_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise UserError(f"weight.top_k is {self.top_k}; a margin needs at least 2 candidates")
        if self.segment_tokens < 1:
            raise UserError(f"weight.segment_tokens is {self.segment_tokens}; it has to be at least 1")

    @property
    def margin_top_k(self) -> int:
        """The candidates of the margin."""
        return self.top_k

    def __call__(self, batch: Batch) -> Tensor:
        if batch.margin_BT is None:
            raise ValueError("this weight reads the teacher's margin of every rollout, but the engine recorded none")
        weight_BT = torch.ones(batch.response_mask_BT.shape, dtype=torch.float64)
        for weight_T, written_T, margin_T in zip(weight_BT, batch.rolled_out_BT, batch.margin_BT, strict=True):
            margins = margin_T[written_T].tolist()
            if any(map(math.isnan, margins)):
                raise ValueError(
                    "this weight reads the teacher's margin of every rollout, but the engine recorded none"
                )
            weight_T[written_T.nonzero()[self.release_at(margins) :, 0]] = 0
        return weight_BT

    def release_at(self, margins: Sequence[float]) -> int:
        """The position from which on nothing counts, or the number of margins where there is no drop."""
        size = self.segment_tokens
        segments = [margins[start : start + size] for start in range(0, len(margins), size)]
        drop = downward_change_point([math.fsum(segment) / len(segment) for segment in segments])
        return len(margins) if drop is None else drop * size


def downward_change_point(series: Sequence[float]) -> int | None:
    """Where the mean of a series drops for good: the first index behind the drop, or None where one mean explains it as well.

    Gaussian noise of one variance, one mean against two. With n values and the squared residuals R, the criterion of one mean
    is n log(R_0 / n) + 2 log n, and of two, with the place between them, n log(R_1 / n) + 4 log n; the smaller one wins.
    """
    count = len(series)
    # A mean on each side explains two values perfectly, whatever they are.
    if count < 4:
        return None
    sums, squares = list(accumulate(series)), math.fsum(value * value for value in series)
    total = sums[-1]

    def residual(place: int) -> float:
        left, right = sums[place - 1], total - sums[place - 1]
        return max(squares - left * left / place - right * right / (count - place), 0.0)

    drops = [
        place for place in range(1, count) if sums[place - 1] / place > (total - sums[place - 1]) / (count - place)
    ]
    if not drops:
        return None
    best = min(drops, key=residual)
    # What rounding leaves of residuals that are 0.
    least = 1e-12 * max(squares, 1e-300)
    one, two = max(squares - total * total / count, least), max(residual(best), least)
    gain = count * math.log(one / two)
    return best if gain > 2 * math.log(count) else None
