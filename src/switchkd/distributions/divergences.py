"""Divergences between two next-token distributions: pure functions, log-probabilities in, nats per position out.

Every function takes `student_logp` and `teacher_logp` of shape (..., V), natural log, normalised over V, and returns
shape (...). None knows of masks, temperatures or chunks (that is objective.py). All are 0 exactly where the two
distributions are equal, never negative, and finite in value and gradient where an id is excluded (-inf) in both.
A new divergence is a function and a row of `DIVERGENCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from switchkd.errors import UserError

# exp(60) is far inside float32, and the probability that a larger ratio multiplies is below exp(-60) of its rival's.
_LARGEST_LOG_RATIO = 60.0


def _log_ratio(p_logp: Tensor, q_logp: Tensor, where_p_is_0: float, where_q_is_0: float) -> Tensor:
    """log p - log q; 0, with no gradient, where both exclude an id, since -inf - -inf is no number."""
    return torch.nan_to_num(p_logp - q_logp, nan=0.0, neginf=where_p_is_0, posinf=where_q_is_0)


def _at_least_zero(total: Tensor) -> Tensor:
    """The sum, lifted to 0 where rounding left it below: its gradient is right even there, and passes."""
    return total + (-total.detach()).clamp(min=0)


def _kullback_leibler(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """KL(p || q) in nats; infinite where q excludes what p does not."""
    p = p_logp.exp()
    # A probability that has underflowed to 0 would make 0 * inf of an infinite ratio.
    log_ratio = _log_ratio(p_logp, q_logp, where_p_is_0=0.0, where_q_is_0=torch.inf).masked_fill(p == 0, 0.0)
    return _at_least_zero((p * log_ratio).sum(dim=-1))


def _bounded_log_ratio(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """log p - log q within the largest log ratio, so that its exponential is finite."""
    log_ratio = _log_ratio(p_logp, q_logp, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _log_of_mixture_to_p(log_ratio: Tensor, p_weight: float) -> Tensor:
    """log(m / p) of m = w p + (1 - w) q, from log(q / p). Exactly 0 at equality, where a log of m is not."""
    return torch.log1p((1 - p_weight) * torch.expm1(log_ratio))


def _kl_to_mixture(p_logp: Tensor, q_logp: Tensor, p_weight: float) -> Tensor:
    """KL(p || w p + (1 - w) q) in nats, at most -log w."""
    to_p = _log_of_mixture_to_p(_bounded_log_ratio(q_logp, p_logp), p_weight)
    return _at_least_zero(-(p_logp.exp() * to_p).sum(dim=-1))


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(
            f"{name} is {value}; it has to be strictly between 0 and 1 (at an end this is 0 or another divergence: "
            f"use forward_kl or reverse_kl)"
        )


def _check_power(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; it has to be positive (for the limit at 0 use forward_kl or reverse_kl)")


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student) in nats: the student must cover what the teacher does (Hinton et al. 2015)."""
    return _kullback_leibler(teacher_logp, student_logp)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) in nats: the student keeps to what the teacher would do (MiniLLM, arXiv 2306.08543)."""
    return _kullback_leibler(student_logp, teacher_logp)


def symmetric_kl(student_logp: Tensor, teacher_logp: Tensor, *, forward_weight: float = 0.5) -> Tensor:
    """w KL(teacher || student) + (1 - w) KL(student || teacher) in nats, with w = `forward_weight`.

    At 1/2 half of Jeffreys' divergence, and symmetric. Raises UserError unless 0 < w < 1.
    """
    _check_share("forward_weight", forward_weight)
    forward, reverse = forward_kl(student_logp, teacher_logp), reverse_kl(student_logp, teacher_logp)
    return forward_weight * forward + (1 - forward_weight) * reverse


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, *, teacher_weight: float = 0.5) -> Tensor:
    """The Jensen-Shannon divergence in nats, at most ln 2 for equal weights.

    w KL(teacher || m) + (1 - w) KL(student || m) with m = w teacher + (1 - w) student and w = `teacher_weight`
    (GKD, arXiv 2306.13649, equation 1, with its beta = w). Raises UserError unless 0 < w < 1: at its ends this is 0,
    not a KL divergence.
    """
    _check_share("teacher_weight", teacher_weight)
    log_ratio = _bounded_log_ratio(student_logp, teacher_logp)
    to_teacher = _log_of_mixture_to_p(log_ratio, teacher_weight)
    of_teacher = teacher_weight * (teacher_logp.exp() * to_teacher).sum(dim=-1)
    of_student = (1 - teacher_weight) * (student_logp.exp() * (to_teacher - log_ratio)).sum(dim=-1)
    return _at_least_zero(-(of_teacher + of_student))


def skewed_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, teacher_weight: float = 0.1) -> Tensor:
    """KL(teacher || w teacher + (1 - w) student) in nats, at most -log w, with w = `teacher_weight`.

    DistiLLM (arXiv 2402.03898), equation 4, with its alpha = w. Raises UserError unless 0 < w < 1.
    """
    _check_share("teacher_weight", teacher_weight)
    return _kl_to_mixture(teacher_logp, student_logp, teacher_weight)


def skewed_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, student_weight: float = 0.1) -> Tensor:
    """KL(student || w student + (1 - w) teacher) in nats, at most -log w, with w = `student_weight`.

    DistiLLM (arXiv 2402.03898), with its alpha = w. Raises UserError unless 0 < w < 1.
    """
    _check_share("student_weight", student_weight)
    return _kl_to_mixture(student_logp, teacher_logp, student_weight)


def total_variation(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """1/2 sum |student - teacher|, from 0 to 1, no unit: the probability that the best coupling of the two differs.

    Its gradient has no part from ids of equal probability (the subgradient 0).
    """
    return (student_logp.exp() - teacher_logp.exp()).abs().sum(dim=-1) / 2


def adaptive_kl(student_logp: Tensor, teacher_logp: Tensor, *, head_mass: float = 0.5) -> Tensor:
    """w KL(teacher || student) + (1 - w) KL(student || teacher) in nats, with w the head's part of sum |student - teacher|.

    The head is the smallest set of the teacher's likeliest ids that has at least `head_mass` of its probability. No gradient
    goes through w (AKL, arXiv 2404.02657). We depart where ids are equally likely: they are in the head together, so
    that the order of ids has no part. Raises UserError unless 0 < `head_mass` < 1.
    """
    _check_share("head_mass", head_mass)
    with torch.no_grad():
        difference = (student_logp.exp() - teacher_logp.exp()).abs()
        of_all = difference.sum(dim=-1)
        of_head = (difference * _is_head(teacher_logp, head_mass)).sum(dim=-1)
        forward_weight = of_head / of_all.clamp(min=torch.finfo(of_all.dtype).tiny)
    forward, reverse = forward_kl(student_logp, teacher_logp), reverse_kl(student_logp, teacher_logp)
    # A weight of 0 switches its divergence off, an infinite one too.
    forward = torch.where(forward_weight > 0, forward_weight * forward, 0.0)
    return forward + torch.where(forward_weight < 1, (1 - forward_weight) * reverse, 0.0)


def _is_head(logp: Tensor, head_mass: float) -> Tensor:
    """True at the ids before which, by falling probability, there is less than `head_mass`, and at their equals."""
    falling = logp.sort(dim=-1, descending=True).values
    mass = falling.exp()
    # A sum that is head_mass but for its rounding has reached it.
    is_head = mass.cumsum(dim=-1) - mass < head_mass * (1 - 1e-6)
    return logp >= falling.masked_fill(~is_head, torch.inf).amin(dim=-1, keepdim=True)


def alpha_beta(
    student_logp: Tensor, teacher_logp: Tensor, *, teacher_power: float = 0.2, student_power: float = 0.7
) -> Tensor:
    """The alpha-beta divergence, no unit (nats in the limit of the KLs), with a = `teacher_power` and b = `student_power`.

    sum over ids of (a/(a+b) teacher^(a+b) + b/(a+b) student^(a+b) - teacher^a student^b) / (a b): ABKD (arXiv 2505.04560),
    with its alpha = a and beta = b. At (1, 1) half the squared distance; towards (1, 0) forward KL, towards (0, 1)
    reverse KL. We depart from the paper in that powers of 0 or below are refused: the KLs have their own names. Raises
    UserError unless both are positive.
    """
    _check_power("teacher_power", teacher_power)
    _check_power("student_power", student_power)
    both = teacher_power + student_power
    # Relative to the larger of the two no exponent is positive, and at equality each term is exactly 0.
    larger_logp = torch.maximum(student_logp, teacher_logp)
    smaller_to_larger = -_log_ratio(student_logp, teacher_logp, -torch.inf, torch.inf).abs()
    of_teacher, of_student = (student_logp.new_tensor(power) for power in (teacher_power, student_power))
    smaller_power = torch.where(student_logp >= teacher_logp, of_teacher, of_student)
    gap = smaller_power / both * torch.expm1(both * smaller_to_larger) - torch.expm1(smaller_power * smaller_to_larger)
    return _at_least_zero(((both * larger_logp).exp() * gap).sum(dim=-1) / (teacher_power * student_power))


@dataclass(frozen=True)
class Divergence:
    """A row of the table: the function and the settings that it takes, with their defaults."""

    function: Callable[..., Tensor]
    settings: Mapping[str, float] = field(default_factory=dict)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "symmetric_kl": Divergence(symmetric_kl, {"forward_weight": 0.5}),
    "jensen_shannon": Divergence(jensen_shannon, {"teacher_weight": 0.5}),
    "skewed_forward_kl": Divergence(skewed_forward_kl, {"teacher_weight": 0.1}),
    "skewed_reverse_kl": Divergence(skewed_reverse_kl, {"student_weight": 0.1}),
    "total_variation": Divergence(total_variation),
    "adaptive_kl": Divergence(adaptive_kl, {"head_mass": 0.5}),
    "alpha_beta": Divergence(alpha_beta, {"teacher_power": 0.2, "student_power": 0.7}),
}

# Every setting that any divergence takes; each is a setting of a run under the same name.
DIVERGENCE_SETTINGS: tuple[str, ...] = tuple(
    dict.fromkeys(name for row in DIVERGENCES.values() for name in row.settings)
)


def divergence_named(name: str, **settings: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of that exact name with its settings filled in; those that are None keep their default.

    Raises UserError for an unknown name (listing the choices), for a setting that the divergence does not take, and for a
    value that it refuses.
    """
    if name not in DIVERGENCES:
        raise UserError(f"there is no divergence named {name!r}; choose one of {', '.join(DIVERGENCES)}")
    row = DIVERGENCES[name]
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in row.settings:
            takes = ", ".join(row.settings) or "no settings"
            raise UserError(f"{key} is {value}, but divergence {name!r} takes {takes}; leave {key} out")
    if not row.settings:
        return row.function
    function = partial(row.function, **{**row.settings, **given})
    # The function's own checks, now and not at the first step: on the one distribution over a single id.
    function(torch.zeros(1), torch.zeros(1))
    return function
