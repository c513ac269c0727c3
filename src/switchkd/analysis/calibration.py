"""From the share of tokens that the teacher is to write to the threshold that gives it, measured on real prompts.

Knows engines by their protocol alone: `Switch.calibrated` leads here, and policies know no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from switchkd.errors import UserError
from switchkd.positions import ByPosition
from switchkd.records import Rollout, Sampling
from switchkd.rollout.policies import Switch

if TYPE_CHECKING:
    from switchkd.rollout.engine import Engine, PromptLike

# The paper's best setting: 53 % of the tokens by the teacher.
PAPER_SHARE = 0.53

# Nats. A float32 model beside itself, drafting and scoring in blocks of different sizes, shows divergences of up to
# 1e-11; the smallest of a trained pair are about 1e-8. Below this, a threshold would tell roundings apart.
_LEAST = 1e-10


@dataclass(frozen=True)
class Calibration:
    """A threshold that was solved for, and what was measured under it on `prompts` prompts of `tokens` tokens in all.

    `policy` is the Switch found; shares are 0 to 1 over all tokens; `rounds` counts the rollouts of all prompts that it
    took. By position: the mean divergence and the threshold in nats, and the share of rows where the teacher wrote.
    """

    policy: Switch
    wanted_share: float
    measured_share: float
    tolerance: float
    prompts: int
    tokens: int
    rounds: int
    divergence: ByPosition
    teacher_share: ByPosition
    threshold: tuple[float, ...]

    @property
    def reached(self) -> bool:
        """Whether the measured share is the wanted one within the tolerance."""
        return abs(self.measured_share - self.wanted_share) <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values: the policy's settings and the totals, and a list for each measure by position."""
        totals = ("wanted_share", "measured_share", "tolerance", "reached", "prompts", "tokens", "rounds")
        settings = ("threshold", "decay", "decay_rate", "final_fraction")
        return {
            **{name: getattr(self.policy, name) for name in settings},
            **{name: getattr(self, name) for name in totals},
            "by_position": {
                "rows": self.divergence.rows,
                "divergence": self.divergence.mean,
                "threshold": self.threshold,
                "teacher_share": self.teacher_share.mean,
            },
        }


def calibrate(
    engine: Engine,
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    *,
    teacher_share: float = PAPER_SHARE,
    policy: Switch = Switch(),  # noqa: B008 - frozen
    seed: int = 0,
    tolerance: float = 0.01,
    max_rounds: int = 12,
) -> Calibration:
    """The threshold at which the teacher writes `teacher_share` of the tokens, with the decay of `policy` kept.

    The share falls as the threshold rises, but the text depends on the threshold too. So each round rolls all prompts
    out at the present threshold, and goes on with the one that would have given the wanted share on that very text, or
    with a bisection where that leaves the bracket of thresholds known to give too much and too little. The same
    arguments give the same result: draws have addresses.

    Where no round comes within `tolerance` (a few hundred tokens can be too few for it), the nearest round is returned
    and `reached` is False. Raises UserError where no threshold can give the share: the models agree, up to float32's
    rounding, on too many tokens, or a linear decay has fallen to 0 and leaves too many to the teacher.
    """
    if not 0 < teacher_share < 1:
        raise UserError(
            f"the teacher share is {teacher_share}; it has to be above 0 and below 1, such as {PAPER_SHARE}"
        )
    if not prompts:
        raise UserError("there is no prompt to calibrate on; give at least one")
    if tolerance < 0 or max_rounds < 1:
        raise UserError(f"tolerance is {tolerance} and max_rounds {max_rounds}; give 0 or more, and at least 1")
    # The thresholds that give too much and too little. The divergence is at most ln 2: above `most`, the teacher writes
    # only where the decay has reached 0.
    decay = _decay(policy, sampling.max_new_tokens)
    most = math.log(2) / float(decay[decay > 0].min())
    low, high = _LEAST, most
    threshold, best = min(max(policy.threshold, low), high), None
    for rounds in range(1, max_rounds + 1):
        tried = replace(policy, threshold=threshold)
        rollouts = engine.generate(prompts, policy=tried, sampling=sampling, seed=seed)
        share = _share(rollouts)
        if best is None or abs(share - teacher_share) < abs(_share(best[1]) - teacher_share):
            best = tried, rollouts
        if abs(share - teacher_share) <= tolerance:
            break
        if share > teacher_share:
            if threshold == most:
                raise UserError(_decayed_to_0(teacher_share, share, policy))
            low = threshold
        else:
            if threshold == _LEAST:
                raise UserError(_too_alike(teacher_share, share))
            high = threshold
        guess = _threshold_for(teacher_share, rollouts, decay)
        # A guess outside may mean that the share is at an end of the range, which is then measured, or out of reach.
        if guess <= low == _LEAST or guess >= high == most:
            threshold = min(max(guess, low), high)
        elif low < guess < high and rounds % 3:
            threshold = guess
        else:
            threshold = math.sqrt(low * high)
    assert best is not None
    return _calibration(*best, teacher_share, tolerance, rounds, sampling.max_new_tokens)


def _decay(policy: Switch, max_new_tokens: int) -> torch.Tensor:
    """The threshold at each position over that at the first, (max_new_tokens,) float64."""
    return replace(policy, threshold=1.0).thresholds(torch.arange(max_new_tokens), max_new_tokens)


def _share(rollouts: Sequence[Rollout]) -> float:
    return sum(sum(rollout.written_by_teacher) for rollout in rollouts) / sum(len(r.token_ids) for r in rollouts)


def _threshold_for(share: float, rollouts: Sequence[Rollout], decay: torch.Tensor) -> float:
    """The threshold above which the given share of these very tokens lies; inf where only an infinite one is enough.

    The teacher writes where the divergence exceeds threshold * decay, so where divergence / decay exceeds the threshold.
    """
    divergence = torch.tensor([value for rollout in rollouts for value in rollout.divergence], dtype=torch.float64)
    position = torch.cat([torch.arange(len(rollout.divergence)) for rollout in rollouts])
    # 0 / 0: the teacher writes where the divergence exceeds 0, and this one does not.
    ranked = (divergence / decay[position]).nan_to_num(nan=0.0, posinf=math.inf).sort(descending=True).values
    last_above = max(0, min(len(ranked) - 2, round(share * len(ranked)) - 1))
    return float(ranked[last_above : last_above + 2].mean())


def _too_alike(wanted: float, share: float) -> str:
    if share == 0:
        return (
            f"a teacher share of {wanted:.0%} cannot be reached: student and teacher agree at every position (all "
            f"divergences are 0, up to rounding), so the teacher writes nothing; is the student the teacher itself?"
        )
    return (
        f"a teacher share of {wanted:.0%} cannot be reached: even with a threshold of almost 0 the teacher writes "
        f"{share:.0%} of the tokens, since the two models agree on the others up to rounding; ask for less"
    )


def _decayed_to_0(wanted: float, share: float, policy: Switch) -> str:
    return (
        f"a teacher share of {wanted:.0%} cannot be reached: the {policy.decay} decay falls to 0, and from there on the "
        f"teacher writes {share:.0%} of the tokens whatever the threshold; take a slower decay"
    )


def _calibration(
    policy: Switch,
    rollouts: Sequence[Rollout],
    wanted_share: float,
    tolerance: float,
    rounds: int,
    max_new_tokens: int,
) -> Calibration:
    divergence = ByPosition.of([rollout.divergence for rollout in rollouts])
    positions = torch.arange(len(divergence.rows))
    return Calibration(
        policy=policy,
        wanted_share=wanted_share,
        measured_share=_share(rollouts),
        tolerance=tolerance,
        prompts=len(rollouts),
        tokens=sum(divergence.rows),
        rounds=rounds,
        divergence=divergence,
        teacher_share=ByPosition.of([rollout.written_by_teacher for rollout in rollouts]),
        threshold=tuple(policy.thresholds(positions, max_new_tokens).tolist()),
    )
