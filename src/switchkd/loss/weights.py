"""The table of weights, and those that read who wrote a token, where it stands and what both models made of it. Weights multiply.

A new weight is a frozen dataclass that extends `Weight` (weight.py), and a row of `WEIGHTS` or a class of another package.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from switchkd.distributions.divergences import Divergence, TopForwardKL
from switchkd.errors import UserError
from switchkd.loss.release import Release
from switchkd.loss.weight import Weight, ones
from switchkd.records import Batch
from switchkd.settings.components import Registry, setting


@dataclass(frozen=True)
class Uniform(Weight):
    """1 everywhere."""

    def __call__(self, batch: Batch) -> Tensor:
        return ones(batch)


@dataclass(frozen=True)
class ByWriter(Weight):
    """By who wrote a token of a rollout; 1 at the data set's text, which neither model wrote.

    The loss is divided by the number of tokens of a weight other than 0. Raises UserError for a negative weight.
    """

    student: float = setting(1.0, "Multiplies the loss of rollout tokens that the student wrote; 0 leaves them out.")
    teacher: float = setting(1.0, "Multiplies the loss of rollout tokens that the teacher wrote; 0 leaves them out.")
    of_rollouts_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for writer in ("student", "teacher"):
            if not 0 <= getattr(self, writer) < math.inf:
                raise UserError(f"weight.{writer} is {getattr(self, writer)}; it has to be 0 or more")

    def trains_on(self, writer: str) -> bool:
        """Where the writer's weight is not 0."""
        return bool(getattr(self, writer))

    def __call__(self, batch: Batch) -> Tensor:
        weight_BT = self.student + (self.teacher - self.student) * batch.written_by_teacher_BT.double()
        return torch.where(batch.rolled_out_BT, weight_BT, 1.0)


@dataclass(frozen=True)
class Prefix(Weight):
    """1 in the first `tokens` of a response, or in the first `share` of `max_new_tokens`, and 0 behind them.

    Rollouts end there, and the data set's responses are cut: nothing behind is written or scored. The loss is divided by the
    number of tokens that count. Source: prefix distillation, arXiv 2602.15260. Raises UserError unless one of the two is
    given.
    """

    tokens: int | None = setting(None, "The number of tokens of a response that count.")
    share: float | None = setting(None, "The same as a share of max_new_tokens, 0 to 1.")

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise UserError(
                f"the weight prefix has tokens {self.tokens} and share {self.share}; give one of them, with its name, such as "
                f"weight: {{name: prefix, tokens: 50}}"
            )
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"weight.tokens is {self.tokens}; at least 1 token has to count")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"weight.share is {self.share}; it has to be above 0 and at most 1")

    def for_length(self, max_new_tokens: int) -> Prefix:
        """The share as a number of tokens, rounded up."""
        return self if self.share is None else Prefix(math.ceil(self.share * max_new_tokens))

    @property
    def longest(self) -> int | None:
        """Where the prefix ends, once `for_length` has said so."""
        return self.tokens

    def __call__(self, batch: Batch) -> Tensor:
        assert self.tokens is not None
        return (batch.response_mask_BT.cumsum(dim=1) <= self.tokens).double()


@dataclass(frozen=True)
class Importance(Weight):
    """IW-OPD: less where the text has left the teacher. w_t = 1 + gamma (1 - A_<t / A), between 1 and 1 + gamma.

    A_<t is the sum over the tokens of a rollout before t of |log p_T - log p_S| of the token, A that over all. 1 at the data
    set's text. The loss is divided by the number of tokens, not by the sum of the weights, as in TRL 1.16.

    Source: arXiv 2606.22600; gamma 0.5 as in TRL 1.16's experimental/iw_opd. Raises UserError for a negative gamma.
    """

    gamma: float = setting(0.5, "How much more the first token counts than the last.")
    reads_logp: ClassVar[bool] = True
    of_rollouts_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"weight.gamma is {self.gamma}; it has to be 0 or more")

    def __call__(self, batch: Batch) -> Tensor:
        student_BT, teacher_BT = _logps(batch)
        discrepancy_BT = (teacher_BT - student_BT).abs()
        before_BT = discrepancy_BT.cumsum(dim=1) - discrepancy_BT
        # TRL's least total, under which all tokens weigh 1 + gamma.
        total_B1 = discrepancy_BT.sum(dim=1, keepdim=True).clamp(min=1e-8)
        return torch.where(batch.rolled_out_BT, 1 + self.gamma * (1 - before_BT / total_B1), 1.0)


@dataclass(frozen=True)
class Trust(Weight):
    """TrOPD: a token of a rollout is trusted by what the teacher thinks of it, min(1, p_T / p_S).

    The rest is masked, or compared by a forward KL over the teacher's `top_k` likeliest tokens. With a `least_trust` a token is
    trusted where min(1, p_T / p_S) reaches it. The loss is divided by the number of tokens of a weight other than 0.

    Source: arXiv 2606.01249, with its k of 64. We depart in two points. The paper trusts a token with that probability, by a
    coin; we take the mean over the coin, which has the same expected gradient and less noise. Inside the region it takes the
    sampled token's estimate of the reverse KL; we take the run's divergence, over the whole vocabulary. Its clipped variant
    acts on that estimate, and is left out. Raises UserError for values out of range.
    """

    least_trust: float | None = setting(
        None, "Trust where min(1, p_T / p_S) reaches this; left out: in that proportion."
    )
    outliers_by: Literal["forward_kl", "mask"] = setting(
        "forward_kl", "What is done with the rest: forward_kl (over the teacher's top_k) or mask."
    )
    top_k: int = setting(64, "The number of the teacher's likeliest tokens in the forward KL of the rest.")
    reads_logp: ClassVar[bool] = True
    of_rollouts_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.least_trust is not None and not 0 < self.least_trust <= 1:
            raise UserError(f"weight.least_trust is {self.least_trust}; it has to be above 0 and at most 1")
        if self.outliers_by not in ("forward_kl", "mask"):
            raise UserError(f"weight.outliers_by is {self.outliers_by!r}; choose forward_kl or mask")
        if self.top_k < 1:
            raise UserError(f"weight.top_k is {self.top_k}; it has to be at least 1")

    @property
    def outlier_divergence(self) -> Divergence | None:
        """The forward KL over the teacher's likeliest tokens, unless outliers are masked."""
        return TopForwardKL(self.top_k) if self.outliers_by == "forward_kl" else None

    def __call__(self, batch: Batch) -> Tensor:
        return self._trust(batch) if self.outliers_by == "mask" else ones(batch)

    def outlier_share(self, batch: Batch) -> Tensor | None:
        """What is missing to 1 of the trust, unless it is masked."""
        return None if self.outliers_by == "mask" else 1 - self._trust(batch)

    def _trust(self, batch: Batch) -> Tensor:
        student_BT, teacher_BT = _logps(batch)
        trust_BT = (teacher_BT - student_BT).exp().clamp(max=1)
        if self.least_trust is not None:
            trust_BT = (trust_BT >= self.least_trust).double()
        return torch.where(batch.rolled_out_BT, trust_BT, 1.0)


def _logps(batch: Batch) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities (B, T) of the tokens of rollouts, 0 elsewhere. Raises ValueError where they are not known."""
    found = []
    for name in ("student_logp_BT", "teacher_logp_BT"):
        logp_BT = getattr(batch, name)
        if logp_BT is None or logp_BT[batch.rolled_out_BT].isnan().any():
            raise ValueError(
                f"this weight reads {name} of every rollout, but the engine recorded none; let the teacher score"
            )
        found.append(logp_BT.masked_fill(~batch.rolled_out_BT, 0.0))
    return found[0], found[1]


WEIGHTS: dict[str, type[Weight]] = {
    "uniform": Uniform,
    "by_writer": ByWriter,
    "prefix": Prefix,
    "importance": Importance,
    "trust": Trust,
    "release": Release,
}

WEIGHT = Registry("weight", "switchkd.weights", Weight, WEIGHTS)  # type: ignore[type-abstract]
