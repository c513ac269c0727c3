"""The training loss written out: all logits at once, the definitions as torch expressions, plain autograd.

Shape letters: V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(p_student: Tensor, p_teacher: Tensor) -> Tensor:
    return (p_teacher * (p_teacher / p_student).log()).sum(dim=-1)


def reverse_kl(p_student: Tensor, p_teacher: Tensor) -> Tensor:
    return forward_kl(p_teacher, p_student)


def jensen_shannon(p_student: Tensor, p_teacher: Tensor, teacher_weight: float = 0.5) -> Tensor:
    mixture = teacher_weight * p_teacher + (1 - teacher_weight) * p_student
    return teacher_weight * forward_kl(mixture, p_teacher) + (1 - teacher_weight) * forward_kl(mixture, p_student)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def dense_loss(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    token_ids_N: Tensor,
    *,
    divergence: str | None,
    denominator: float,
    cross_entropy_weight: float = 0.0,
    loss_temperature: float = 1.0,
    weight_N: Tensor | None = None,
) -> Tensor:
    """sum over positions of weight * (divergence at the temperature + cross_entropy_weight * -log p) / denominator."""
    loss_N = torch.zeros(len(token_ids_N), dtype=student_logits_NV.dtype)
    if divergence is not None:
        student, teacher = (
            torch.softmax(logits / loss_temperature, dim=-1) for logits in (student_logits_NV, teacher_logits_NV)
        )
        loss_N = loss_N + DIVERGENCES[divergence](student, teacher)
    p_token = torch.softmax(student_logits_NV, dim=-1)[range(len(token_ids_N)), token_ids_N]
    loss_N = loss_N - cross_entropy_weight * p_token.log()
    return (loss_N if weight_N is None else loss_N * weight_N).sum() / denominator
