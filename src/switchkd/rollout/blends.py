"""Laws between the two models': mixtures, and the blend inside a trust region about the student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.rollout.law import Blend, Decision, Policy, Positions, Student, without_threshold
from switchkd.settings.components import setting


@dataclass(frozen=True)
class SharedWriting(Policy):
    """A policy whose teacher has a share of the positions, wherever the two models agree or not."""

    teacher_share: float = setting(0.2, "The share of tokens that the teacher writes, 0 to 1.")

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_share <= 1:
            raise UserError(f"teacher_share is {self.teacher_share}; it is the teacher's share of tokens, from 0 to 1")

    @property
    def writers(self) -> tuple[str, ...]:
        """Both, unless the share is all or nothing."""
        shares = {"student": 1 - self.teacher_share, "teacher": self.teacher_share}
        return tuple(writer for writer, share in shares.items() if share > 0)


@dataclass(frozen=True)
class Mix(SharedWriting):
    """The law teacher_share * p_T + (1 - teacher_share) * p_S: also the control at random places.

    MiniLLM's teacher-mixed sampling, whose share is 0.2. Its importance weights belong to the loss (loss/policy_gradient.py). The
    share of one rollout varies about the mean. Greedy, the likeliest token of the mixture is taken.

    Source: Gu et al. 2024, MiniLLM, arXiv 2306.08543, section 2.2. Raises UserError for a share outside 0 to 1.
    """

    def decide(self, positions: Positions) -> Decision:
        """The mixture everywhere; the threshold is NaN."""
        mass = torch.full_like(positions.divergence, self.teacher_share)
        share = positions.teacher_logp.new_tensor(self.teacher_share)
        logp = torch.logaddexp(share.log() + positions.teacher_logp, (1 - share).log() + positions.student_logp)
        return without_threshold(torch.ones_like(mass, dtype=torch.bool), Blend(logp, mass))


@dataclass(frozen=True)
class Interleave(Policy):
    """Speculative knowledge distillation: keep the student's token if it is among the teacher's `keep_top_k` most likely.

    Otherwise the teacher draws from its whole distribution, and may draw the refused token. With r the student's mass outside the
    teacher's top k, the law is p_S(x) [x in the top k] + r p_T(x). Ids tied at the edge all count as among the most likely; an id
    that the teacher excludes never does.

    Source: Xu et al. 2025, SKD, arXiv 2410.11325, with its top 25. We depart in two points: ranks and draw are of the
    distribution after the run's temperature, top-k and top-p, which act on both models alike; and the number of drafted
    tokens, a setting of the paper, belongs to the engine and changes no token. Raises UserError for keep_top_k below 1.
    """

    keep_top_k: int = setting(25, "Keep the student's token if it is among the teacher's most likely `keep_top_k`.")

    def __post_init__(self) -> None:
        if self.keep_top_k < 1:
            raise UserError(f"keep_top_k is {self.keep_top_k}; the teacher has to accept at least its 1 best token")

    def decide(self, positions: Positions) -> Decision:
        """The law above; greedy, the teacher where the student's likeliest token is refused. The threshold is NaN."""
        student_logp, teacher_logp = positions.student_logp, positions.teacher_logp
        edge = teacher_logp.topk(min(self.keep_top_k, teacher_logp.shape[-1]), dim=-1).values[..., -1:]
        refused = (teacher_logp < edge) | teacher_logp.isneginf()
        if positions.greedy:
            proposal = student_logp.argmax(dim=-1, keepdim=True)
            return without_threshold(refused.gather(-1, proposal)[..., 0])
        kept_logp = student_logp.masked_fill(refused, -torch.inf)
        mass = (student_logp.exp() * refused).sum(dim=-1)
        # No warning and no NaN where nothing is refused: log 0 is -inf, and adds nothing.
        logp = torch.logaddexp(kept_logp, mass.log().unsqueeze(-1) + teacher_logp)
        return without_threshold(torch.ones_like(mass, dtype=torch.bool), Blend(logp, mass))


# Halvings of [0, 1] that leave an interval below 1e-6.
_HALVINGS = 20


@dataclass(frozen=True)
class TrustRegionBlend(Policy):
    """TRB: of all laws within `budget` nats of the student, the nearest to the teacher.

    The law is p_S^(1-b) p_T^b, normalized, with the largest b in [0, 1] for which KL(law || p_S) <= budget at this prefix; b to
    1e-6. Where either model excludes an id, so does the law, unless b = 0. The budget falls linearly from its value to 0 over the
    first `anneal_steps` steps of training, from where on the student writes alone; 0 steps: it stays.

    Source: arXiv 2605.31159. Raises UserError for values out of range.
    """

    budget: float = setting(0.1, "The most that the law may differ from the student: KL(law || student) in nats.")
    anneal_steps: int = setting(0, "The budget falls linearly to 0 over this many steps; 0: it stays.")

    def __post_init__(self) -> None:
        if not 0 <= self.budget < math.inf:
            raise UserError(f"budget is {self.budget}; give nats, 0 (the student alone) or more")
        if self.anneal_steps < 0:
            raise UserError(f"anneal_steps is {self.anneal_steps}; give a number of steps, or 0 for a constant budget")

    def at_step(self, step: int) -> Policy:
        """With the budget in force at a training step, which stays as it is from there on; the student alone where that is 0."""
        if not self.anneal_steps:
            return self
        budget = self.budget * max(0.0, 1 - step / self.anneal_steps)
        return replace(self, budget=budget, anneal_steps=0) if budget else Student()

    def decide(self, positions: Positions) -> Decision:
        """The blend everywhere; the threshold is NaN."""
        logp = trust_region_blend(positions.student_logp, positions.teacher_logp, self.budget)
        return without_threshold(torch.ones_like(positions.divergence, dtype=torch.bool), Blend(logp))


def trust_region_blend(student_logp: Tensor, teacher_logp: Tensor, budget: float) -> Tensor:
    """Log-probabilities (..., V) of the law of `TrustRegionBlend`."""
    if budget == 0:
        # In float32 the rounding of the divergence would let a little of the teacher in.
        return student_logp
    support = ~(student_logp.isneginf() | teacher_logp.isneginf())
    # What either excludes: out of every blend, and of both sums below.
    base = student_logp.masked_fill(~support, -torch.inf)
    log_ratio = (teacher_logp - student_logp).masked_fill(~support, 0.0)

    def blended(exponent: Tensor) -> Tensor:
        scores = base + exponent[..., None] * log_ratio
        return scores - scores.logsumexp(dim=-1, keepdim=True)

    def affordable(exponent: Tensor) -> Tensor:
        # KL(law || p_S) = E[b log_ratio] - log of the sum; both where the law has mass.
        scores = base + exponent[..., None] * log_ratio
        log_sum = scores.logsumexp(dim=-1)
        mean = ((scores - log_sum[..., None]).exp() * log_ratio).sum(dim=-1)
        return exponent * mean - log_sum <= budget

    low, high = torch.zeros_like(log_ratio[..., 0]), torch.ones_like(log_ratio[..., 0])
    low = torch.where(affordable(high), high, low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within = affordable(middle)
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return torch.where((low > 0)[..., None], blended(low), student_logp)
