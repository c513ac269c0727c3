"""Wrong divergences, each with the checks of `checks.divergence` that have to catch it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Fault:
    """A wrong implementation, the divergence that it claims to be, and the names of the checks that catch it."""

    function: Callable[[Tensor, Tensor], Tensor]
    claims: str
    caught_by: tuple[str, ...]
    teacher_weight: float | None = None

    @property
    def settings(self) -> dict[str, float]:
        return {} if self.teacher_weight is None else {"teacher_weight": self.teacher_weight}


def cross_entropy_called_forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return -(teacher_logp.exp() * student_logp).sum(dim=-1)


def forward_kl_that_is_nan_at_excluded_ids(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(dim=-1)


def reverse_kl_that_is_nan_at_excluded_ids(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(teacher_logp, student_logp, reduction="none", log_target=True).sum(dim=-1)


def forward_kl_with_nan_only_in_the_gradient(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    terms = teacher_logp.exp() * (teacher_logp - student_logp)
    return torch.where(teacher_logp > -torch.inf, terms, 0).sum(dim=-1)


def jensen_shannon_that_is_nan_at_excluded_ids(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    mixture = torch.logaddexp(student_logp, teacher_logp) - math.log(2)
    of_teacher = (teacher_logp.exp() * (teacher_logp - mixture)).sum(dim=-1)
    return 0.5 * of_teacher + 0.5 * (student_logp.exp() * (student_logp - mixture)).sum(dim=-1)


def the_other_direction(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(teacher_logp, student_logp, reduction="none", log_target=True).sum(dim=-1)


def mean_over_the_vocabulary(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).mean(dim=-1)


def mean_over_the_batch(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(student_logp, teacher_logp, reduction="batchmean", log_target=True)


def _jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, teacher_weight: float) -> Tensor:
    p_student, p_teacher = student_logp.exp(), teacher_logp.exp()
    mixture_logp = (teacher_weight * p_teacher + (1 - teacher_weight) * p_student).log()
    of_teacher = (p_teacher * (teacher_logp - mixture_logp)).sum(dim=-1)
    return teacher_weight * of_teacher + (1 - teacher_weight) * (p_student * (student_logp - mixture_logp)).sum(dim=-1)


def weight_multiplies_the_student(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _jensen_shannon(student_logp, teacher_logp, 0.9)


def log_of_base_2(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _jensen_shannon(student_logp, teacher_logp, 0.5) / math.log(2)


def rounding_lifted_by_a_clamp(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).sum(dim=-1).clamp(min=0)


def rounding_left_negative(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return F.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).sum(dim=-1)


def student_cut_off_from_the_gradient(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return forward_kl_that_is_nan_at_excluded_ids(student_logp.detach(), teacher_logp)


def by_the_likeliest_ids_alone(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    top = teacher_logp.topk(min(8, teacher_logp.shape[-1]), dim=-1).indices
    return forward_kl_that_is_nan_at_excluded_ids(student_logp.gather(-1, top), teacher_logp.gather(-1, top))


def tied_to_the_order_of_ids(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return forward_kl_that_is_nan_at_excluded_ids(student_logp, teacher_logp.roll(1, dims=-1))


FAULTS = [
    Fault(cross_entropy_called_forward_kl, "forward_kl", ("zero_at_equality", "values")),
    Fault(forward_kl_that_is_nan_at_excluded_ids, "forward_kl", ("excluded_in_both",)),
    Fault(reverse_kl_that_is_nan_at_excluded_ids, "reverse_kl", ("excluded_in_both",)),
    Fault(forward_kl_with_nan_only_in_the_gradient, "forward_kl", ("excluded_in_both",)),
    Fault(jensen_shannon_that_is_nan_at_excluded_ids, "jensen_shannon", ("excluded_in_both",)),
    Fault(the_other_direction, "forward_kl", ("values", "gradients")),
    Fault(mean_over_the_vocabulary, "forward_kl", ("values", "gradients")),
    Fault(mean_over_the_batch, "forward_kl", ("values",)),
    Fault(weight_multiplies_the_student, "jensen_shannon", ("values", "gradients"), teacher_weight=0.1),
    Fault(log_of_base_2, "jensen_shannon", ("values", "gradients")),
    Fault(rounding_lifted_by_a_clamp, "forward_kl", ("near_equality",)),
    Fault(rounding_left_negative, "forward_kl", ("near_equality",)),
    Fault(student_cut_off_from_the_gradient, "forward_kl", ("gradients",)),
    Fault(by_the_likeliest_ids_alone, "forward_kl", ("values", "gradients")),
    Fault(tied_to_the_order_of_ids, "forward_kl", ("values", "zero_at_equality", "permutation")),
]
