"""Who writes the next token: the student or the teacher. A new policy is a class with `needs_teacher` and `decide`.

A decision at a position may depend on the two distributions there, on the position and on the position's own addressed
coin, so it is the same whether positions are decided one at a time or a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from switchkd.errors import UserError

if TYPE_CHECKING:
    from switchkd.records import Sampling
    from switchkd.rollout.engine import Engine, PromptLike


@dataclass(frozen=True)
class Positions:
    """What a policy sees. All tensors share one shape: (B,) for one position of each row, or (B, T) for a block.

    `position` counts generated tokens from 0; `divergence` is the Jensen-Shannon divergence in nats; `student_logp` and
    `teacher_logp` have one more dimension, V; `proposal` is the student's token; `max_new_tokens` bounds `position`.
    """

    position: Tensor
    divergence: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    proposal: Tensor
    max_new_tokens: int


@dataclass(frozen=True)
class Decision:
    """`by_teacher`: True where the teacher writes; `threshold`: what the divergence was compared with, or NaN."""

    by_teacher: Tensor
    threshold: Tensor


class Policy(Protocol):
    """Decides position by position who writes. Without `needs_teacher` the student writes alone, no teacher runs."""

    needs_teacher: ClassVar[bool]

    def decide(self, positions: Positions) -> Decision:
        """The writer at each position, shapes as given."""


def _always(positions: Positions, by_teacher: bool) -> Decision:
    return Decision(
        torch.full_like(positions.position, by_teacher, dtype=torch.bool),
        torch.full_like(positions.divergence, math.nan),
    )


@dataclass(frozen=True)
class Student:
    """The student writes every token: on-policy distillation (GKD, arXiv 2306.13649, with lambda = 1)."""

    needs_teacher: ClassVar[bool] = False

    def decide(self, positions: Positions) -> Decision:
        """The student everywhere; the threshold is NaN."""
        return _always(positions, by_teacher=False)


@dataclass(frozen=True)
class Teacher:
    """The teacher writes every token: the text of sequence-level distillation (Kim and Rush 2016)."""

    needs_teacher: ClassVar[bool] = True

    def decide(self, positions: Positions) -> Decision:
        """The teacher everywhere; the threshold is NaN."""
        return _always(positions, by_teacher=True)


def _exponential(position: Tensor, rate: float) -> Tensor:
    return torch.exp(-rate * position)


def _linear(position: Tensor, rate: float) -> Tensor:
    return (1 - rate * position).clamp(min=0)


def _constant(position: Tensor, rate: float) -> Tensor:
    return torch.ones_like(position)


@dataclass(frozen=True)
class _Decay:
    """A decay: its curve, and the rate at which the threshold has fallen to a fraction after a number of steps."""

    curve: Callable[[Tensor, float], Tensor]
    rate_for: Callable[[float, int], float]


DECAYS: dict[str, _Decay] = {
    "exponential": _Decay(_exponential, lambda fraction, steps: -math.log(fraction) / steps),
    "linear": _Decay(_linear, lambda fraction, steps: (1 - fraction) / steps),
    "constant": _Decay(_constant, lambda fraction, steps: 0.0),
}

DecayName = Literal["exponential", "linear", "constant"]


@dataclass(frozen=True)
class Switch:
    """SWITCH: the teacher writes where the divergence exceeds a threshold that decays with length.

    The teacher writes position t where JSD(teacher, student) > tau_t, in nats (0 to ln 2 = 0.693), with

        tau_t = threshold * exp(-decay_rate * t)          decay="exponential", the paper's
        tau_t = threshold * max(0, 1 - decay_rate * t)    decay="linear"
        tau_t = threshold                                 decay="constant"

    The paper calls 1/10 its best decay factor, without our being able to read what that factor multiplies. Both
    readings can be set: `decay_rate` (per token), or `final_fraction`, the threshold at the last position allowed by
    `max_new_tokens` over the threshold at the first, from which the rate follows. Where neither is given, the
    default is `final_fraction` = 1/10.

    Source: Koo et al., SWITCH, Findings of NAACL 2025, arXiv 2410.19503. Raises UserError for values out of range.
    """

    threshold: float = 0.3
    decay_rate: float | None = None
    final_fraction: float | None = None
    decay: DecayName = "exponential"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UserError(f"there is no decay named {self.decay!r}; choose one of {', '.join(DECAYS)}")
        if not self.threshold >= 0:
            raise UserError(
                f"threshold is {self.threshold}; give nats, from 0 to ln 2 = 0.693 (above, it never switches)"
            )
        if self.decay_rate is not None and self.final_fraction is not None:
            raise UserError(
                f"decay_rate ({self.decay_rate}) and final_fraction ({self.final_fraction}) are two ways to say the "
                "same thing; give one of them"
            )
        if self.decay_rate is not None and not 0 <= self.decay_rate < math.inf:
            raise UserError(f"decay_rate is {self.decay_rate}; it has to be 0 or more, per token")
        if self.final_fraction is not None and not 0 < self.final_fraction <= 1:
            raise UserError(f"final_fraction is {self.final_fraction}; it has to be above 0 and at most 1")

    @classmethod
    def calibrated(
        cls,
        engine: Engine,
        prompts: Sequence[PromptLike],
        sampling: Sampling,
        *,
        teacher_share: float = 0.53,
        decay_rate: float | None = None,
        final_fraction: float | None = None,
        decay: DecayName = "exponential",
        seed: int = 0,
    ) -> Switch:
        """The Switch of this decay under which the teacher writes `teacher_share` (0 to 1) of the tokens on `prompts`.

        53 % is the paper's best. `calibrate` in calibration.py says how, what it raises, and more of what was measured.
        """
        from switchkd.calibration import calibrate

        shape = cls(decay_rate=decay_rate, final_fraction=final_fraction, decay=decay)
        return calibrate(engine, prompts, sampling, teacher_share=teacher_share, policy=shape, seed=seed).policy

    def rate(self, max_new_tokens: int) -> float:
        """The decay rate per token that is in force for responses of at most `max_new_tokens` tokens."""
        if self.decay_rate is not None:
            return self.decay_rate
        fraction = 0.1 if self.final_fraction is None else self.final_fraction
        return DECAYS[self.decay].rate_for(fraction, max(1, max_new_tokens - 1))

    def thresholds(self, position: Tensor, max_new_tokens: int) -> Tensor:
        """The threshold in nats at each position, float64, the shape of `position`."""
        return self.threshold * DECAYS[self.decay].curve(position.double(), self.rate(max_new_tokens))

    def decide(self, positions: Positions) -> Decision:
        """The teacher where the divergence exceeds the threshold."""
        threshold = self.thresholds(positions.position, positions.max_new_tokens).to(positions.divergence.dtype)
        return Decision(positions.divergence > threshold, threshold)


POLICIES: dict[str, type[Policy]] = {"student": Student, "teacher": Teacher, "switch": Switch}


def policy_named(name: str, **settings: Any) -> Policy:
    """The policy of that exact name with its settings filled in; those that are None keep their default.

    Raises UserError for an unknown name (listing the choices), and for a setting that the policy does not take.
    """
    if name not in POLICIES:
        raise UserError(f"there is no policy named {name!r}; choose one of {', '.join(POLICIES)}")
    given = {key: value for key, value in settings.items() if value is not None}
    takes = [each.name for each in fields(POLICIES[name])]  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in takes:
            raise UserError(
                f"{key} is {value}, but policy {name!r} takes {', '.join(takes) or 'no settings'}; leave it out"
            )
    return POLICIES[name](**given)
