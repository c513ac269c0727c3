"""Divergences between two next-token distributions: pure functions, log-probabilities in, nats per position out.

Every function takes `student_logp` and `teacher_logp` of shape (..., V), natural log, normalised over V, and returns
shape (...). None knows of masks, temperatures or chunks (that is objective.py). All are 0 exactly where the two
distributions are equal, never negative, and finite in value and gradient where an id is excluded (-inf) in both.
A new divergence is a function and a row of `DIVERGENCES`.
"""

from __future__ import annotations

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
    log_ratio = _log_ratio(p_logp, q_logp, where_p_is_0=0.0, where_q_is_0=torch.inf)
    return _at_least_zero((p_logp.exp() * log_ratio).sum(dim=-1))


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student) in nats: the student must cover what the teacher does (Hinton et al. 2015)."""
    return _kullback_leibler(teacher_logp, student_logp)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) in nats: the student keeps to what the teacher would do (MiniLLM, arXiv 2306.08543)."""
    return _kullback_leibler(student_logp, teacher_logp)


def _check_inside(name: str, value: float, ends: str) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}; it has to be strictly between 0 and 1 ({ends})")


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, *, teacher_weight: float = 0.5) -> Tensor:
    """The Jensen-Shannon divergence in nats, at most ln 2 for equal weights.

    w KL(teacher || m) + (1 - w) KL(student || m) with m = w teacher + (1 - w) student and w = `teacher_weight`
    (GKD, arXiv 2306.13649, equation 1, with its beta = w). Raises UserError unless 0 < w < 1: at its ends this is 0,
    not a KL divergence.
    """
    _check_inside("teacher_weight", teacher_weight, "use forward_kl or reverse_kl for the one-sided divergences")
    log_ratio = _log_ratio(student_logp, teacher_logp, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    log_ratio = log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    # log(m / teacher); log(m / student) is this less the log ratio. Exactly 0 at equality, where a log of m is not.
    to_teacher = torch.log1p((1 - teacher_weight) * torch.expm1(log_ratio))
    of_teacher = teacher_weight * (teacher_logp.exp() * to_teacher).sum(dim=-1)
    of_student = (1 - teacher_weight) * (student_logp.exp() * (to_teacher - log_ratio)).sum(dim=-1)
    return _at_least_zero(-(of_teacher + of_student))


@dataclass(frozen=True)
class Divergence:
    """A row of the table: the function and the settings that it takes, with their defaults."""

    function: Callable[..., Tensor]
    settings: Mapping[str, float] = field(default_factory=dict)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "jensen_shannon": Divergence(jensen_shannon, {"teacher_weight": 0.5}),
}


def divergence_named(name: str, **settings: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of that exact name with its settings filled in; those that are None keep their default.

    Raises UserError for an unknown name (listing the choices), and for a setting that the divergence does not take.
    """
    if name not in DIVERGENCES:
        raise UserError(f"there is no divergence named {name!r}; choose one of {', '.join(DIVERGENCES)}")
    row = DIVERGENCES[name]
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in row.settings:
            takes = ", ".join(row.settings) or "no settings"
            raise UserError(f"{key} is {value}, but divergence {name!r} takes {takes}; leave {key} out")
        _check_inside(key, value, f"setting of divergence {name!r}")
    return partial(row.function, **{**row.settings, **given}) if row.settings else row.function
