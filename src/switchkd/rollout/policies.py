"""The table of policies, and those whose law is one model's: they decide who writes the next token, student or teacher.

A new policy is a frozen dataclass that extends `Policy` (law.py), and a row of `POLICIES` or a class of another package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.rollout.blends import Interleave, Mix, SharedWriting, TrustRegionBlend
from switchkd.rollout.law import Decision, Policy, Positions, Student, Teacher, in_float64, without_threshold
from switchkd.settings.components import Registry, setting
from switchkd.settings.paper import PAPER_FINAL_FRACTION


def _tokens(share: float, max_new_tokens: int) -> int:
    return round(share * max_new_tokens)


@dataclass(frozen=True)
class Early(SharedWriting):
    """The teacher writes first: a control with SWITCH's share of teacher tokens, but without its choice of places.

    `teacher_share` is of `max_new_tokens`, in whole tokens: a response that ends earlier has a larger share of them. The
    default of 0.2 is Mix's. Raises UserError for a share outside 0 to 1.
    """

    def decide(self, positions: Positions) -> Decision:
        """The teacher at the first positions; the threshold is NaN."""
        return without_threshold(positions.position < _tokens(self.teacher_share, positions.max_new_tokens))


@dataclass(frozen=True)
class Late(SharedWriting):
    """The teacher writes last: a control with SWITCH's share of teacher tokens, but without its choice of places.

    `teacher_share` is of `max_new_tokens`, in whole tokens: a response that ends earlier has a smaller share, or none. The
    default of 0.2 is Mix's. Raises UserError for a share outside 0 to 1.
    """

    def decide(self, positions: Positions) -> Decision:
        """The teacher at the last of the `max_new_tokens` positions; the threshold is NaN."""
        first = positions.max_new_tokens - _tokens(self.teacher_share, positions.max_new_tokens)
        return without_threshold(positions.position >= first)


@dataclass(frozen=True)
class _Decay:
    """A decay: its curve, and the rate at which the threshold has fallen to a fraction after a number of steps."""

    curve: Callable[[Tensor, float], Tensor]
    rate_for: Callable[[float, int], float]


DECAYS: dict[str, _Decay] = {
    "exponential": _Decay(lambda at, rate: torch.exp(-rate * at), lambda fraction, steps: -math.log(fraction) / steps),
    "linear": _Decay(lambda at, rate: (1 - rate * at).clamp(min=0), lambda fraction, steps: (1 - fraction) / steps),
    "constant": _Decay(lambda at, rate: torch.ones_like(at), lambda fraction, steps: 0.0),
}

DecayName = Literal["exponential", "linear", "constant"]


@dataclass(frozen=True)
class Switch(Policy):
    """SWITCH: the teacher writes where the divergence exceeds a threshold that decays with length.

    The teacher writes position t where JSD(teacher, student) > tau_t, in nats (0 to ln 2 = 0.693), with

        tau_t = threshold * exp(-decay_rate * t)          decay="exponential", the paper's
        tau_t = threshold * max(0, 1 - decay_rate * t)    decay="linear"
        tau_t = threshold                                 decay="constant"

    The paper's best decay factor is 1/10, but we could not read what that factor multiplies. Both readings can be set:
    `decay_rate` (per token), or `final_fraction`, the threshold at the last position that `max_new_tokens` allows over the
    threshold at the first; the rate follows from it. The default is `final_fraction` = 1/10.

    Source: Koo et al., SWITCH, Findings of NAACL 2025, arXiv 2410.19503. Raises UserError for values out of range.
    """

    threshold: float = setting(0.3, "tau_0 in nats, 0 to 0.693: the teacher writes where the divergence is larger.")
    decay_rate: float | None = setting(None, "The threshold's decay per token (lambda).")
    final_fraction: float | None = setting(
        None, "Threshold at the last position over that at the first; 0.1 where decay_rate is not set either."
    )
    decay: DecayName = setting("exponential", "How the threshold falls: exponential, linear or constant.")

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

    def rate(self, max_new_tokens: int) -> float:
        """The decay rate per token that is in force for responses of at most `max_new_tokens` tokens."""
        if self.decay_rate is not None:
            return self.decay_rate
        fraction = PAPER_FINAL_FRACTION if self.final_fraction is None else self.final_fraction
        return DECAYS[self.decay].rate_for(fraction, max(1, max_new_tokens - 1))

    def thresholds(self, position: Tensor, max_new_tokens: int) -> Tensor:
        """The threshold in nats at each position, float64, the shape of `position`; on its device, or the CPU (`in_float64`)."""
        return self.threshold * DECAYS[self.decay].curve(in_float64(position), self.rate(max_new_tokens))

    def decide(self, positions: Positions) -> Decision:
        """The teacher where the divergence exceeds the threshold."""
        divergence = positions.divergence
        threshold = self.thresholds(positions.position, positions.max_new_tokens).to(divergence.dtype)
        threshold = threshold.to(divergence.device)
        return Decision(divergence > threshold, threshold)


@dataclass(frozen=True)
class AdaSwitch(Policy):
    """AdaSwitch: the student writes until the divergence jumps, then the teacher writes to the end: one switch.

    The first position i >= window with d_i > tau_i is the teacher's, and so are all after it, where

        tau_i = factor * mean(d_(i - window), ..., d_(i - 1))        in nats

    The student writes until `window` divergences are known, which is how we read the paper. We depart in the divergence: it is
    the Jensen-Shannon divergence that every rollout records, not KL(teacher || student); the paper finds its method robust to
    the metric. Its factor K and window L could not be read at the source; the defaults are ours.

    Source: Peng et al. 2025, arXiv 2510.07842. Raises UserError for values out of range.
    """

    factor: float = setting(2.0, "The teacher takes over above this multiple of the mean divergence.")
    window: int = setting(8, "The number of divergences before the token that the mean is taken over.")
    needs_history: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise UserError(f"factor is {self.factor}; it multiplies the mean divergence, and has to be 0 or more")
        if self.window < 1:
            raise UserError(f"window is {self.window}; the mean has to be over at least 1 divergence")

    def decide(self, positions: Positions) -> Decision:
        """The teacher from the switch on; the threshold is NaN before the window is full and after the switch."""
        assert positions.past_divergence is not None
        assert positions.past_by_teacher is not None
        # One position of each row is a block of one. On the CPU, in float64, which holds a record's numbers exactly.
        rows, shape = len(positions.past_by_teacher), positions.divergence.shape
        block_BT = positions.divergence.cpu().double().reshape(rows, -1)
        width = block_BT.shape[1]
        padded = torch.nn.functional.pad(positions.past_divergence, (self.window, 0), value=math.nan)
        series = torch.cat([padded[:, -self.window :], block_BT], dim=1)
        # Added in order of position: a reduction may add in another order for another shape, with other roundings.
        total = sum((series[:, at : at + width] for at in range(self.window)), start=torch.zeros_like(block_BT))
        threshold = total * (self.factor / self.window)
        jumps = block_BT > threshold
        switched_before = (jumps.cumsum(dim=1) - jumps.long() > 0) | positions.past_by_teacher.any(dim=1, keepdim=True)
        threshold = threshold.masked_fill(switched_before, math.nan)
        by_teacher = (jumps | switched_before).reshape(shape).to(positions.divergence.device)
        return Decision(by_teacher, threshold.reshape(shape))


POLICIES: dict[str, type[Policy]] = {
    "student": Student,
    "teacher": Teacher,
    "switch": Switch,
    "adaswitch": AdaSwitch,
    "interleave": Interleave,
    "mix": Mix,
    "trust_region_blend": TrustRegionBlend,
    "early": Early,
    "late": Late,
}


POLICY = Registry("policy", "switchkd.policies", Policy, POLICIES)  # type: ignore[type-abstract]
