"""From the share of tokens that the teacher is to write to the threshold that gives it, measured on real prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from switchkd.errors import UserError
from switchkd.positions import ByPosition
from switchkd.records import Rollout, Sampling, teacher_share_of
from switchkd.rollout.engine import Engine, PromptLike
from switchkd.rollout.policies import Switch
from switchkd.settings.paper import DEFAULT_SHARE

# Nats. A float32 model compared with itself, drafting and scoring in blocks of different sizes, shows divergences of up
# to 1e-11; the smallest of a trained pair are about 1e-8. Below this, a threshold would tell roundings apart.
_LEAST = 1e-10
# A few hundred tokens may hold no threshold that is near enough; more rounds would then find none either.
_MAX_ROUNDS = 12
# Nats: what a Jensen-Shannon divergence can be at most.
_LARGEST = math.log(2)
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Calibration:
    """A threshold that was solved for, and what was measured under it on `prompts` prompts of `tokens` tokens in all.

    `policy` is the Switch found; shares are 0 to 1 over all tokens; `rounds` is how often all prompts were rolled out. By
    position: the mean divergence and the threshold in nats, and the share of rows where the teacher wrote. `quantiles` are those
    of the divergence over all tokens, in nats by share.
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
    quantiles: dict[float, float]

    @property
    def reached(self) -> bool:
        """Whether the measured share is the wanted one within the tolerance."""
        return abs(self.measured_share - self.wanted_share) <= self.tolerance

    @property
    def first_reachable(self) -> int:
        """The first position, from 0, where a divergence can exceed the threshold: none is larger than ln 2."""
        return sum(threshold >= _LARGEST for threshold in self.threshold)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values: the policy's settings and the totals, and a list for each measure by position."""
        totals = ("wanted_share", "measured_share", "tolerance", "reached", "prompts", "tokens", "rounds")
        return {
            **asdict(self.policy),
            **{name: getattr(self, name) for name in totals},
            "quantiles": self.quantiles,
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
    teacher_share: float = DEFAULT_SHARE,
    policy: Switch = Switch(),
    seed: int = 0,
    tolerance: float = 0.01,
) -> Calibration:
    """The threshold at which the teacher writes `teacher_share` of the tokens, with the decay of `policy` kept.

    The share falls as the threshold rises, but the text depends on the threshold too. So each round rolls out all prompts
    at the current threshold and goes on with the one that would have given the wanted share on that text, or with a
    bisection where that leaves the bracket of thresholds known to give too much and too little. Draws have addresses, so
    the same arguments give the same result.

    Where no round comes within `tolerance` (a few hundred tokens can be too few for it), the nearest round is returned
    and `reached` is False. Raises UserError where no threshold can give the share: the models agree, up to float32's
    rounding, on too many tokens, or a linear decay has fallen to 0 and leaves too many to the teacher.
    """
    if not 0 < teacher_share < 1:
        raise UserError(f"the teacher share is {teacher_share}; it has to be between 0 and 1, such as {DEFAULT_SHARE}")
    if not prompts:
        raise UserError("there is no prompt to calibrate on; give at least one")
    if tolerance < 0:
        raise UserError(f"tolerance is {tolerance}; it has to be 0 or more")
    bracket = _Bracket(policy, teacher_share, sampling.max_new_tokens)
    rounds, nearest = 0, None
    while True:
        rounds += 1
        tried = replace(policy, threshold=bracket.threshold)
        rollouts = engine.generate(prompts, policy=tried, sampling=sampling, seed=seed)
        share = teacher_share_of(rollouts)
        if nearest is None or abs(share - teacher_share) < abs(nearest.measured_share - teacher_share):
            nearest = _measured(tried, rollouts, teacher_share, tolerance, sampling.max_new_tokens)
        if not nearest.reached:
            bracket.narrow(rollouts, share, bisect=rounds % 3 == 0)
        if nearest.reached or rounds == _MAX_ROUNDS:
            _warn_of_a_late_start(nearest)
            return replace(nearest, rounds=rounds)


def _warn_of_a_late_start(found: Calibration) -> None:
    threshold, tokens = found.policy.threshold, found.first_reachable
    if tokens:
        logging.getLogger(__name__).warning(
            f"the threshold for {found.wanted_share:.0%} of the tokens begins at {threshold:.2g}, above every divergence (ln 2 = "
            f"0.69), so the teacher writes none of the first {tokens} tokens; ask for a larger share (docs/threshold.md)"
        )


class _Bracket:
    """The thresholds `low` and `high` that give too much and too little, and the `threshold` to try next.

    `decay` (max_new_tokens,), float64, is the threshold at each position over that at the first.
    """

    def __init__(self, policy: Switch, wanted_share: float, max_new_tokens: int) -> None:
        self.policy = policy
        self.wanted_share = wanted_share
        self.decay = replace(policy, threshold=1.0).thresholds(torch.arange(max_new_tokens), max_new_tokens)
        # The divergence is at most ln 2: above this, the teacher writes only where the decay has reached 0.
        self.most = _LARGEST / float(self.decay[self.decay > 0].min())
        self.low, self.high = _LEAST, self.most
        self.threshold = min(max(policy.threshold, _LEAST), self.most)

    def narrow(self, rollouts: Sequence[Rollout], share: float, *, bisect: bool) -> None:
        """Take in what the threshold gave, and choose the next. Raises UserError where none gives the wanted share."""
        if share > self.wanted_share:
            if self.threshold == self.most:
                raise UserError(_decayed_to_0(self.wanted_share, share, self.policy))
            self.low = self.threshold
        else:
            if self.threshold == _LEAST:
                raise UserError(_too_alike(self.wanted_share, share))
            self.high = self.threshold
        guess = _threshold_for(self.wanted_share, rollouts, self.decay)
        # A guess outside may mean that the share is at an end of the range, which is then measured, or out of reach.
        if guess <= self.low == _LEAST or guess >= self.high == self.most:
            self.threshold = min(max(guess, self.low), self.high)
        elif self.low < guess < self.high and not bisect:
            self.threshold = guess
        else:
            # Thresholds span ten orders of magnitude, so the middle is the geometric one.
            self.threshold = math.sqrt(self.low * self.high)


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


def _quantiles(divergence: Sequence[float]) -> dict[float, float]:
    """The divergence that each share of the tokens stays below."""
    # torch.quantile refuses more than 16 million values.
    ranked = sorted(divergence)
    return {share: ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in _QUANTILES}


def _measured(
    policy: Switch, rollouts: Sequence[Rollout], wanted_share: float, tolerance: float, max_new_tokens: int
) -> Calibration:
    divergence = ByPosition.of([rollout.divergence for rollout in rollouts])
    positions = torch.arange(len(divergence.rows))
    return Calibration(
        policy=policy,
        wanted_share=wanted_share,
        measured_share=teacher_share_of(rollouts),
        tolerance=tolerance,
        prompts=len(rollouts),
        tokens=sum(divergence.rows),
        rounds=1,
        divergence=divergence,
        teacher_share=ByPosition.of([rollout.written_by_teacher for rollout in rollouts]),
        threshold=tuple(policy.thresholds(positions, max_new_tokens).tolist()),
        quantiles=_quantiles([value for rollout in rollouts for value in rollout.divergence]),
    )
