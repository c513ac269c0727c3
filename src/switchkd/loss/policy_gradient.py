"""MiniLLM's long-term term: what a token does to the divergence of the tokens after it, by policy gradient.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd.records import Batch
from switchkd.rollout.policies import Policy


def importance_and_returns(batch: Batch, policy: Policy) -> tuple[Tensor, Tensor]:
    """Importance weights and returns (nats), both (B, T) float64 without gradient; 1 and 0 at the data set's text.

    With r_t = log p_teacher(y_t) - log p_student(y_t), q the student and m what `policy` wrote the text with:

        importance_t = q(y_t) / m(y_t)            return_t = mean of r over the tokens after t, 0 at the last

    importance_t * (reverse KL_t - return_t * log q(y_t)) then has the gradient of MiniLLM's equation 8: the single-step term
    is summed over the vocabulary, the long-term term is length-normalised, and the weights are per token, as the paper
    takes them in place of products over the prefix. The paper's clipping has no part: the text is of the student as it is.
    Where `policy` is Student, and but for the normalisation, it is the exact gradient of KL(student || teacher) of sequences.

    Source: Gu et al. 2024, arXiv 2306.08543, equations 5 to 8.
    """
    assert batch.student_logp_BT is not None
    assert batch.teacher_logp_BT is not None
    written = batch.rolled_out_BT
    student_BT, teacher_BT = (
        logp.masked_fill(~written, 0.0) for logp in (batch.student_logp_BT, batch.teacher_logp_BT)
    )
    reward_BT = teacher_BT - student_BT
    to_come_BT = _after(reward_BT) / _after(written.double()).clamp(min=1)
    importance_BT = (student_BT - policy.written_logp(student_BT, teacher_BT, batch.written_by_teacher_BT)).exp()
    return importance_BT.masked_fill(~written, 1.0), to_come_BT.masked_fill(~written, 0.0)


def _after(values_BT: Tensor) -> Tensor:
    """The sum of what stands after each position."""
    return torch.flip(torch.flip(values_BT, [1]).cumsum(dim=1), [1]) - values_BT
