"""Divergences between two next-token distributions: log-probabilities in, nats per position out.

A divergence is called with `student_logp` and `teacher_logp` of shape (..., V), natural log, normalized over V, and returns
shape (...). It knows no mask, temperature or chunk; those are the objective's. It is 0 exactly where the two distributions are
equal, never negative, and finite in value and gradient where an id is excluded (-inf) in both.

A new divergence is a frozen dataclass and a row of `DIVERGENCES`, or a class of another package (docs/extending.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.settings.components import Registry, setting, settings_of

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


class Divergence(ABC):
    """A divergence with its settings filled in; a frozen dataclass extends it. Raises UserError for settings out of range.

    `of_single_ids` is True where an event of several ids, such as all that a teacher's signal does not keep, has no place in it.
    """

    of_single_ids: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, each in settings_of(type(self)).items():
            if check := each.metadata.get("check"):
                check(name, getattr(self, name))

    @abstractmethod
    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """The divergence at each position, (...), from log-probabilities (..., V)."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) in nats: the student must cover what the teacher does (Hinton et al. 2015)."""

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return _kullback_leibler(teacher_logp, student_logp)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) in nats: the student keeps to what the teacher would do (MiniLLM, arXiv 2306.08543)."""

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return _kullback_leibler(student_logp, teacher_logp)


# The default of what compares with the start model.
REVERSE_KL = ReverseKL()


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """w KL(teacher || student) + (1 - w) KL(student || teacher) in nats, with w = `forward_weight`.

    At 1/2 this is half of Jeffreys' divergence, and symmetric. Raises UserError unless 0 < w < 1.
    """

    forward_weight: float = setting(
        0.5, "Weight of the forward KL, inside 0..1; the reverse KL has the rest.", check=_check_share
    )

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        forward, reverse = _kullback_leibler(teacher_logp, student_logp), _kullback_leibler(student_logp, teacher_logp)
        return self.forward_weight * forward + (1 - self.forward_weight) * reverse


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """The Jensen-Shannon divergence in nats, at most ln 2 for equal weights.

    w KL(teacher || m) + (1 - w) KL(student || m) with m = w teacher + (1 - w) student and w = `teacher_weight`
    (GKD, arXiv 2306.13649, equation 1, with its beta = w). Raises UserError unless 0 < w < 1: at its ends this is 0,
    not a KL divergence.
    """

    teacher_weight: float = setting(0.5, "The teacher's weight in the mixture, inside 0..1.", check=_check_share)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        log_ratio = _bounded_log_ratio(student_logp, teacher_logp)
        to_teacher = _log_of_mixture_to_p(log_ratio, self.teacher_weight)
        of_teacher = self.teacher_weight * (teacher_logp.exp() * to_teacher).sum(dim=-1)
        of_student = (1 - self.teacher_weight) * (student_logp.exp() * (to_teacher - log_ratio)).sum(dim=-1)
        return _at_least_zero(-(of_teacher + of_student))


@dataclass(frozen=True)
class SkewedForwardKL(Divergence):
    """KL(teacher || w teacher + (1 - w) student) in nats, at most -log w, with w = `teacher_weight`.

    DistiLLM (arXiv 2402.03898), equation 4, with its alpha = w. Raises UserError unless 0 < w < 1.
    """

    teacher_weight: float = setting(0.1, "The teacher's weight in the mixture, inside 0..1.", check=_check_share)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return _kl_to_mixture(teacher_logp, student_logp, self.teacher_weight)


@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """KL(student || w student + (1 - w) teacher) in nats, at most -log w, with w = `student_weight`.

    DistiLLM (arXiv 2402.03898), with its alpha = w. Raises UserError unless 0 < w < 1.
    """

    student_weight: float = setting(0.1, "The student's weight in the mixture, inside 0..1.", check=_check_share)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return _kl_to_mixture(student_logp, teacher_logp, self.student_weight)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """1/2 sum |student - teacher|, from 0 to 1, no unit: the probability that the best coupling of the two differs.

    Ids of equal probability add nothing to its gradient (the subgradient 0).
    """

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return (student_logp.exp() - teacher_logp.exp()).abs().sum(dim=-1) / 2


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """w KL(teacher || student) + (1 - w) KL(student || teacher) in nats, with w the head's part of sum |student - teacher|.

    The head is the smallest set of the teacher's likeliest ids that holds at least `head_mass` of its probability. No gradient
    goes through w (AKL, arXiv 2404.02657). We depart where ids are equally likely: they enter the head together, so that the
    order of ids does not matter. Raises UserError unless 0 < `head_mass` < 1.
    """

    head_mass: float = setting(0.5, "The teacher's probability in the head, inside 0..1.", check=_check_share)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        with torch.no_grad():
            difference = (student_logp.exp() - teacher_logp.exp()).abs()
            of_all = difference.sum(dim=-1)
            of_head = (difference * _is_head(teacher_logp, self.head_mass)).sum(dim=-1)
            forward_weight = of_head / of_all.clamp(min=torch.finfo(of_all.dtype).tiny)
        forward, reverse = _kullback_leibler(teacher_logp, student_logp), _kullback_leibler(student_logp, teacher_logp)
        # A weight of 0 switches its divergence off, even an infinite one.
        forward = torch.where(forward_weight > 0, forward_weight * forward, 0.0)
        return forward + torch.where(forward_weight < 1, (1 - forward_weight) * reverse, 0.0)


def _is_head(logp: Tensor, head_mass: float) -> Tensor:
    """True at the ids before which, by falling probability, there is less than `head_mass`, and at their equals."""
    falling = logp.sort(dim=-1, descending=True).values
    mass = falling.exp()
    # A sum that is head_mass but for its rounding has reached it.
    is_head = mass.cumsum(dim=-1) - mass < head_mass * (1 - 1e-6)
    return logp >= falling.masked_fill(~is_head, torch.inf).amin(dim=-1, keepdim=True)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence, no unit (nats in the limit of the KLs), with a = `teacher_power` and b = `student_power`.

    sum over ids of (a/(a+b) teacher^(a+b) + b/(a+b) student^(a+b) - teacher^a student^b) / (a b): ABKD (arXiv 2505.04560),
    with its alpha = a and beta = b. At (1, 1) this is half the squared distance; towards (1, 0) forward KL, towards (0, 1)
    reverse KL. We depart from the paper in refusing powers of 0 or below: the KLs have their own names. Raises UserError
    unless both are positive.
    """

    teacher_power: float = setting(0.2, "The power of the teacher's probability, above 0.", check=_check_power)
    student_power: float = setting(0.7, "The power of the student's probability, above 0.", check=_check_power)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        both = self.teacher_power + self.student_power
        # Relative to the larger of the two no exponent is positive, and at equality each term is exactly 0.
        larger_logp = torch.maximum(student_logp, teacher_logp)
        smaller_to_larger = -_log_ratio(student_logp, teacher_logp, -torch.inf, torch.inf).abs()
        of_teacher, of_student = (student_logp.new_tensor(power) for power in (self.teacher_power, self.student_power))
        smaller_power = torch.where(student_logp >= teacher_logp, of_teacher, of_student)
        part = torch.expm1(both * smaller_to_larger)
        gap = smaller_power / both * part - torch.expm1(smaller_power * smaller_to_larger)
        scale = self.teacher_power * self.student_power
        return _at_least_zero(((both * larger_logp).exp() * gap).sum(dim=-1) / scale)


@dataclass(frozen=True)
class TopForwardKL(Divergence):
    """The forward KL's part over the teacher's `top_k` likeliest ids: sum of p_T log(p_T / p_S), in nats.

    Part of a divergence is none: it may be negative, and so it is not in the table. TrOPD (arXiv 2606.01249) takes it where
    the teacher does not trust the student's token. Ids tied at the edge all count.
    """

    top_k: int = setting(64, "The number of the teacher's likeliest ids.")
    of_single_ids: ClassVar[bool] = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        edge = teacher_logp.topk(min(self.top_k, teacher_logp.shape[-1]), dim=-1).values[..., -1:]
        terms = teacher_logp.exp() * _log_ratio(teacher_logp, student_logp, where_p_is_0=0.0, where_q_is_0=torch.inf)
        return terms.masked_fill(teacher_logp < edge, 0.0).sum(dim=-1)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "symmetric_kl": SymmetricKL,
    "jensen_shannon": JensenShannon,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "total_variation": TotalVariation,
    "adaptive_kl": AdaptiveKL,
    "alpha_beta": AlphaBeta,
}

DIVERGENCE = Registry("divergence", "switchkd.divergences", Divergence, DIVERGENCES)  # type: ignore[type-abstract]
