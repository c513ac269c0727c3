"""What a weight is: it says where the loss counts.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from switchkd.distributions.divergences import Divergence
from switchkd.records import Batch


class Weight(ABC):
    """Multiplies the loss of each token. It knows texts, not gradients. Raises UserError for settings out of range.

    `reads_logp` is True where both models' log-probabilities of each token have to stand in the rollout, those of the student as
    it wrote (with `rollout_steps` or a replay some steps ago): then the teacher scores the student's text while it is written,
    and temperature has to be 1, with top-k and top-p off. `sum_is_denominator`
    is True where the step's loss is divided by the sum of the weights; else it is divided by the number of tokens of a weight
    other than 0. `of_rollouts_alone` is True where the weight is 1 at the data set's text.
    """

    reads_logp: ClassVar[bool] = False
    sum_is_denominator: ClassVar[bool] = False
    of_rollouts_alone: ClassVar[bool] = False

    @property
    def margin_top_k(self) -> int:
        """Over how many of the student's likeliest tokens the engine is to record the teacher's margin; 0: not at all."""
        return 0

    @property
    def outlier_divergence(self) -> Divergence | None:
        """What is compared in place of the run's divergence at a share of the loss, if `outlier_share` gives one."""
        return None

    def trains_on(self, writer: str) -> bool:
        """Whether a token of a rollout that "student" or "teacher" wrote can have a weight other than 0."""
        return True

    def for_length(self, max_new_tokens: int) -> Weight:
        """The weight for responses of at most `max_new_tokens` tokens."""
        return self

    @property
    def longest(self) -> int | None:
        """The number of tokens that can count; rollouts stop there. None sets no limit."""
        return None

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The weights (B, T), 0 or more, float64 on the CPU; read where `batch.response_mask_BT` is True."""

    def outlier_share(self, batch: Batch) -> Tensor | None:
        """The share (B, T), 0 to 1, of each token's loss that the `outlier_divergence` takes over from the run's."""
        return None


def ones(batch: Batch) -> Tensor:
    """A weight of 1 (B, T) everywhere, float64."""
    return torch.ones(batch.response_mask_BT.shape, dtype=torch.float64)


def product_of(weights: Sequence[Weight], batch: Batch) -> Tensor:
    """The product (B, T) of the weights, float64."""
    return math.prod((weight(batch) for weight in weights), start=ones(batch))
