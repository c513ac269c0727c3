"""What every target has to satisfy, as a function of log-probabilities and in a loss.

Shape letters: P positions, E events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TargetFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# From probabilities of the teacher, the student and the start model.
Definition = Callable[[Sequence[float], Sequence[float], Sequence[float]], list[float]]
# Logits of the student, and those of the teacher: the loss of each position.
Loss = Callable[[Tensor, Tensor], Tensor]


def random_logp(seed: int, positions: int = 12, events: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher, student and start model, (P, E); the later positions exclude ids in one, in two and in all three of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, positions, events, generator=generator, dtype=torch.float64)
    for excluded, first in (((0,), 4), ((1,), 5), ((2,), 6), ((0, 1), 7), ((0, 2), 8), ((1, 2), 9), ((0, 1, 2), 10)):
        for model in excluded:
            logits[model, first, 2:5] = -torch.inf
    teacher, student, start = logits.log_softmax(dim=-1)
    return teacher, student, start


def check_target(target: TargetFunction, definition: Definition) -> None:
    """The definition's distribution, in log-probabilities that are normalized and exclude what it excludes."""
    for seed in range(3):
        teacher, student, start = random_logp(seed)
        found = target(teacher, student, start)
        rows = zip(*(logp.exp().tolist() for logp in (teacher, student, start)), strict=True)
        expected = torch.tensor([definition(*row) for row in rows], dtype=torch.float64).log()
        # float64: roundings of a sum of 9.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_constant(loss: Loss, constant: Loss) -> None:
    """The gradient is that of a loss whose target is a constant, and none arrives at the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    found, expected = loss(student, teacher).sum(), constant(student, teacher.detach()).sum()
    # float64: roundings of sums of 7.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (of_constant,) = torch.autograd.grad(expected, student)
    of_student, of_teacher = torch.autograd.grad(found, (student, teacher), allow_unused=True)
    torch.testing.assert_close(of_student, of_constant, rtol=1e-11, atol=1e-13)
    assert of_teacher is None or not of_teacher.any()
