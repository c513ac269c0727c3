"""MiniLLM's long-term term: the effect of a token on the divergence of later tokens, by policy gradient.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd.records import Batch


def importance_and_returns(batch: Batch) -> tuple[Tensor, Tensor]:
    """Importance weights and returns (nats), both (B, T), float64, without gradient; 1 and 0 at the data set's text.

    With r_t = log p_teacher(y_t) - log p_student(y_t), q the student and m the law that the text was drawn from:

        importance_t = q(y_t) / m(y_t)            return_t = mean of r over the tokens after t, 0 at the last

    importance_t * (reverse KL_t - return_t * log q(y_t)) then has the gradient of MiniLLM's equation 8: the single-step term
    is summed over the vocabulary, the long-term term is normalized by length, and the weights are per token, as the paper
    takes them instead of products over the prefix. We depart from the paper in not clipping: the text is that of the current
    student. If the student wrote alone, this is, up to the normalization, the exact gradient of the sequences'
    KL(student || teacher).

    Source: Gu et al. 2024, arXiv 2306.08543, equations 5 to 8. Raises ValueError if the batch lacks log-probabilities.
    """
    if batch.student_logp_BT is None or batch.teacher_logp_BT is None or batch.law_logp_BT is None:
        raise ValueError("the long-term term needs rollouts with both models' log-probabilities of their tokens")
    written = batch.rolled_out_BT
    if batch.law_logp_BT[written].isnan().any():
        raise ValueError(
            "the long-term term needs the law's log-probabilities of rollouts, but the engine recorded none"
        )
    student_BT, teacher_BT, law_BT = (
        logp.masked_fill(~written, 0.0) for logp in (batch.student_logp_BT, batch.teacher_logp_BT, batch.law_logp_BT)
    )
    reward_BT = teacher_BT - student_BT
    # Both sums run over the tokens after each position; the last has none.
    to_come_BT = _after(reward_BT) / _after(written.double()).clamp(min=1)
    importance_BT = (student_BT - law_BT).exp()
    return importance_BT.masked_fill(~written, 1.0), to_come_BT.masked_fill(~written, 0.0)


def _after(values_BT: Tensor) -> Tensor:
    """The sum of the values after each position."""
    return torch.flip(torch.flip(values_BT, [1]).cumsum(dim=1), [1]) - values_BT
