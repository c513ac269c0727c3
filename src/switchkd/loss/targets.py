"""What the student is compared with: the teacher's distribution, or one made of it.

A new target is a frozen dataclass that extends `Target`, and a row of `TARGETS` or a class of another package
(docs/extending.md).

Shape letters: P positions, E events.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.settings.components import Registry, setting


class Target(ABC):
    """The distribution in the teacher's place in the divergence. `needs_start`: it reads the student's start model too."""

    needs_start: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
        """Log-probabilities (P, E) in nats, normalized over E. What comes in has that shape, at the loss temperature, detached."""


@dataclass(frozen=True)
class TeacherTarget(Target):
    """The teacher's own distribution."""

    def __call__(self, teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
        return teacher_logp


# The default of what has a target.
OF_TEACHER = TeacherTarget()


@dataclass(frozen=True)
class Proximal(Target):
    """A target nearer to the student: p_S^(1-w) p_T^w, normalized, with w = `teacher_weight`; no gradient passes through it.

    In the spirit of the trust regions of TOP-D (arXiv 2607.04751), whose proximal teacher is the arithmetic mean
    w p_T + (1 - w) p_S; the geometric one is that of Veto (arXiv 2601.07155) up to its exponents. The default is ours. Raises
    UserError unless 0 < w <= 1.
    """

    teacher_weight: float = setting(
        0.5, "The teacher's exponent, above 0 and at most 1, where it is the teacher itself."
    )

    def __post_init__(self) -> None:
        if not 0 < self.teacher_weight <= 1:
            raise UserError(f"target.teacher_weight is {self.teacher_weight}; it has to be above 0 and at most 1")

    def __call__(self, teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
        return _along(student_logp, teacher_logp, self.teacher_weight)


@dataclass(frozen=True)
class Extrapolated(Target):
    """ExOPD: beyond the teacher, seen from where the student started: p_0 (p_T / p_0)^scale, normalized, p_0 the start model.

    Source: arXiv 2602.12125, whose reward is the teacher's log-ratio to a reference, scaled; it scales by 1.25. The reference
    here is the student's start model. Raises UserError for a scale below 1.
    """

    scale: float = setting(1.25, "How far beyond: 1 is the teacher itself.")
    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.scale < math.inf:
            raise UserError(f"target.scale is {self.scale}; it has to be 1 (the teacher) or more")

    def __call__(self, teacher_logp: Tensor, student_logp: Tensor, start_logp: Tensor | None) -> Tensor:
        assert start_logp is not None
        return _along(start_logp, teacher_logp, self.scale)


def _along(from_logp: Tensor, to_logp: Tensor, distance: float) -> Tensor:
    """The distribution at `distance` on the geometric line through two, 0 at the first and 1 at the second.

    What the second excludes stays excluded; where only the first excludes an id, the second's probability is taken.
    """
    log_ratio = torch.where(from_logp.isneginf() | to_logp.isneginf(), 0.0, to_logp - from_logp)
    # From the second, so that at 1 it is that one to the last bit.
    scores = to_logp + (distance - 1) * log_ratio
    return scores if distance == 1 else scores - scores.logsumexp(dim=-1, keepdim=True)


TARGETS: dict[str, type[Target]] = {
    "teacher": TeacherTarget,
    "proximal": Proximal,
    "extrapolated": Extrapolated,
}

TARGET = Registry("target", "switchkd.targets", Target, TARGETS)  # type: ignore[type-abstract]
