"""Wrong targets, and wrong losses of right ones, each with the definition that catches it.

Shape letters: P positions, E events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from checks.targets import Definition, TargetFunction
from reference import targets as reference

WEIGHT, SCALE = 0.3, 1.25
PROXIMAL = partial(reference.proximal, teacher_weight=WEIGHT)
EXTRAPOLATED = partial(reference.extrapolated, scale=SCALE)


@dataclass(frozen=True)
class Fault:
    """A wrong target, and what it claims to be."""

    function: TargetFunction
    claims: Definition


def _normalized(scores: Tensor) -> Tensor:
    return scores.log_softmax(dim=-1)


def arithmetic_mean(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    return (WEIGHT * teacher_logp.exp() + (1 - WEIGHT) * student_logp.exp()).log()


def exponents_exchanged(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    return _normalized((1 - WEIGHT) * teacher_logp + WEIGHT * student_logp)


def proximal_that_is_not_normalized(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    return WEIGHT * teacher_logp + (1 - WEIGHT) * student_logp


def proximal_to_the_start_model(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    assert start_logp is not None
    return _normalized(WEIGHT * teacher_logp + (1 - WEIGHT) * start_logp)


def proximal_that_keeps_what_the_student_excludes(
    teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None
) -> Tensor:
    return _normalized(WEIGHT * teacher_logp + (1 - WEIGHT) * student_logp)


def extrapolated_to_the_other_side(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    assert start_logp is not None
    ratio = torch.nan_to_num(teacher_logp - start_logp, nan=0.0, posinf=0.0, neginf=0.0)
    return _normalized(teacher_logp + (1 - SCALE) * ratio)


def extrapolated_from_the_student(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    ratio = torch.nan_to_num(teacher_logp - student_logp, nan=0.0, posinf=0.0, neginf=0.0)
    return _normalized(teacher_logp + (SCALE - 1) * ratio)


def extrapolated_by_the_whole_scale(teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
    assert start_logp is not None
    ratio = torch.nan_to_num(teacher_logp - start_logp, nan=0.0, posinf=0.0, neginf=0.0)
    return _normalized(teacher_logp + SCALE * ratio)


def extrapolated_that_is_nan_at_excluded_ids(
    teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None
) -> Tensor:
    assert start_logp is not None
    return _normalized(start_logp + SCALE * (teacher_logp - start_logp))


FAULTS = [
    Fault(arithmetic_mean, PROXIMAL),
    Fault(exponents_exchanged, PROXIMAL),
    Fault(proximal_that_is_not_normalized, PROXIMAL),
    Fault(proximal_to_the_start_model, PROXIMAL),
    Fault(proximal_that_keeps_what_the_student_excludes, PROXIMAL),
    Fault(extrapolated_to_the_other_side, EXTRAPOLATED),
    Fault(extrapolated_from_the_student, EXTRAPOLATED),
    Fault(extrapolated_by_the_whole_scale, EXTRAPOLATED),
    Fault(extrapolated_that_is_nan_at_excluded_ids, EXTRAPOLATED),
]


# -------------------------------------------------------------------------------------------------- in a forward KL


def _forward_kl(student_logp: Tensor, target_logp: Tensor) -> Tensor:
    return (target_logp.exp() * (target_logp - student_logp)).sum(dim=-1)


def _proximal(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _normalized(WEIGHT * teacher_logp + (1 - WEIGHT) * student_logp)


def constant_target(student_PE: Tensor, teacher_PE: Tensor) -> Tensor:
    """The loss that the faults are variants of."""
    student_logp = student_PE.log_softmax(dim=-1)
    return _forward_kl(student_logp, _proximal(student_logp, teacher_PE.log_softmax(dim=-1)).detach())


def target_not_detached(student_PE: Tensor, teacher_PE: Tensor) -> Tensor:
    student_logp = student_PE.log_softmax(dim=-1)
    return _forward_kl(student_logp, _proximal(student_logp, teacher_PE.log_softmax(dim=-1).detach()))


def teacher_not_detached(student_PE: Tensor, teacher_PE: Tensor) -> Tensor:
    student_logp = student_PE.log_softmax(dim=-1)
    return _forward_kl(student_logp, _proximal(student_logp.detach(), teacher_PE.log_softmax(dim=-1)))


def student_detached(student_PE: Tensor, teacher_PE: Tensor) -> Tensor:
    """The target alone has the gradient."""
    student_logp, teacher_logp = student_PE.log_softmax(dim=-1), teacher_PE.log_softmax(dim=-1).detach()
    return _forward_kl(student_logp.detach(), _proximal(student_logp, teacher_logp))


LOSS_FAULTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    target_not_detached,
    teacher_not_detached,
    student_detached,
)
