"""Wrong divergences, each with the checks of `checks.divergence` that have to catch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Fault:
    """A wrong implementation, the divergence that it claims to be, and the names of the checks that catch it."""

    function: Callable[[Tensor, Tensor], Tensor]
    claims: str
    caught_by: tuple[str, ...]
    settings: Mapping[str, float] = field(default_factory=dict)


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


def _kl_to_mixture(p_logp: Tensor, q_logp: Tensor, p_weight: float) -> Tensor:
    return (p_logp.exp() * (p_logp - (p_weight * p_logp.exp() + (1 - p_weight) * q_logp.exp()).log())).sum(dim=-1)


def skewed_forward_kl_with_the_weight_on_the_student(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _kl_to_mixture(teacher_logp, student_logp, 0.9)


def skewed_reverse_kl_from_the_teacher(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """The right mixture, but the teacher's divergence to it."""
    mixture = 0.1 * student_logp.exp() + 0.9 * teacher_logp.exp()
    return (teacher_logp.exp() * (teacher_logp - mixture.log())).sum(dim=-1)


def skewed_reverse_kl_to_a_constant_mixture(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    mixture = (0.1 * student_logp.exp() + 0.9 * teacher_logp.exp()).detach()
    return (student_logp.exp() * (student_logp - mixture.log())).sum(dim=-1)


def symmetric_kl_as_a_sum(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return ((student_logp.exp() - teacher_logp.exp()) * (student_logp - teacher_logp)).sum(dim=-1)


def total_variation_without_the_half(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return (student_logp.exp() - teacher_logp.exp()).abs().sum(dim=-1)


def total_variation_by_a_root(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Its gradient at a tie is 0 / 0."""
    return (student_logp.exp() - teacher_logp.exp()).square().sqrt().sum(dim=-1) / 2


def _adaptive_kl(student_logp: Tensor, teacher_logp: Tensor, *, detach: bool = True, swap: bool = False) -> Tensor:
    p_student, p_teacher = student_logp.exp(), teacher_logp.exp()
    order = p_teacher.argsort(dim=-1, descending=True)
    gap = (p_student - p_teacher).abs().gather(-1, order)
    mass = p_teacher.gather(-1, order)
    of_head = (gap * (mass.cumsum(dim=-1) - mass < 0.5)).sum(dim=-1)
    share = of_head / gap.sum(dim=-1)
    share = share.detach() if detach else share
    share = 1 - share if swap else share
    forward = F.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).sum(dim=-1)
    return share * forward + (1 - share) * the_other_direction(student_logp, teacher_logp)


def adaptive_kl_with_0_by_0_at_equality(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _adaptive_kl(student_logp, teacher_logp)


def adaptive_kl_with_its_weights_swapped(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _adaptive_kl(student_logp, teacher_logp, swap=True)


def adaptive_kl_with_a_gradient_through_its_weights(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _adaptive_kl(student_logp, teacher_logp, detach=False)


def _alpha_beta(student_logp: Tensor, teacher_logp: Tensor, a: float, b: float) -> Tensor:
    p, q = teacher_logp.exp(), student_logp.exp()
    terms = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b) - p**a * q**b
    return terms.sum(dim=-1) / (a * b)


def alpha_beta_with_its_powers_swapped(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _alpha_beta(student_logp, teacher_logp, 0.7, 0.2)


def alpha_beta_as_it_is_written(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Powers have no derivative at 0. That they cancel shows or not by the processor's rounding, so no check relies on it."""
    return _alpha_beta(student_logp, teacher_logp, 0.2, 0.7)


def without_a_derivative_for_the_teacher(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return forward_kl_that_is_nan_at_excluded_ids(student_logp, teacher_logp.detach())


def infinite_times_zero(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """As forward KL in torch, but for ids that both exclude."""
    log_ratio = torch.where(teacher_logp == student_logp, 0.0, teacher_logp - student_logp)
    return (teacher_logp.exp() * log_ratio).sum(dim=-1)


FAULTS = [
    Fault(cross_entropy_called_forward_kl, "forward_kl", ("zero_at_equality", "values")),
    Fault(forward_kl_that_is_nan_at_excluded_ids, "forward_kl", ("excluded_in_both",)),
    Fault(reverse_kl_that_is_nan_at_excluded_ids, "reverse_kl", ("excluded_in_both",)),
    Fault(forward_kl_with_nan_only_in_the_gradient, "forward_kl", ("excluded_in_both",)),
    Fault(jensen_shannon_that_is_nan_at_excluded_ids, "jensen_shannon", ("excluded_in_both",)),
    Fault(the_other_direction, "forward_kl", ("values", "gradients")),
    Fault(mean_over_the_vocabulary, "forward_kl", ("values", "gradients")),
    Fault(mean_over_the_batch, "forward_kl", ("values",)),
    Fault(weight_multiplies_the_student, "jensen_shannon", ("values", "gradients"), {"teacher_weight": 0.1}),
    Fault(log_of_base_2, "jensen_shannon", ("values", "gradients")),
    Fault(rounding_lifted_by_a_clamp, "forward_kl", ("near_equality",)),
    Fault(rounding_left_negative, "forward_kl", ("near_equality",)),
    Fault(student_cut_off_from_the_gradient, "forward_kl", ("gradients",)),
    Fault(by_the_likeliest_ids_alone, "forward_kl", ("values", "gradients")),
    Fault(tied_to_the_order_of_ids, "forward_kl", ("values", "zero_at_equality", "permutation")),
    Fault(skewed_forward_kl_with_the_weight_on_the_student, "skewed_forward_kl", ("values", "gradients")),
    Fault(skewed_reverse_kl_from_the_teacher, "skewed_reverse_kl", ("values", "gradients")),
    Fault(skewed_reverse_kl_to_a_constant_mixture, "skewed_reverse_kl", ("gradients", "finite_differences")),
    Fault(symmetric_kl_as_a_sum, "symmetric_kl", ("values", "gradients")),
    Fault(total_variation_without_the_half, "total_variation", ("values", "gradients")),
    Fault(total_variation_by_a_root, "total_variation", ("zero_at_equality", "excluded_in_both")),
    Fault(adaptive_kl_with_0_by_0_at_equality, "adaptive_kl", ("zero_at_equality",)),
    Fault(adaptive_kl_with_its_weights_swapped, "adaptive_kl", ("values", "gradients")),
    Fault(adaptive_kl_with_a_gradient_through_its_weights, "adaptive_kl", ("gradients",)),
    Fault(alpha_beta_with_its_powers_swapped, "alpha_beta", ("values", "gradients")),
    Fault(alpha_beta_as_it_is_written, "alpha_beta", ("excluded_in_both",)),
    Fault(without_a_derivative_for_the_teacher, "forward_kl", ("finite_differences",)),
    Fault(infinite_times_zero, "forward_kl", ("excluded_in_one",)),
]
