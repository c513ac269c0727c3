"""Pairs of distributions, addresses to draw at, and whether many draws follow a law."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from reference.policies import ByWriter, coupled, interleaved, mixed, trust_region
from switchkd.distributions.draw import Draft, student_proposal
from switchkd.distributions.noise import Address, row_keys
from switchkd.records import Prompt
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy

# The chance that a right implementation fails a statistical test; on these fixed addresses it passes for good.
ALPHA = 1e-4
DRAWS = 40_000

# The student's and the teacher's probabilities.
PAIRS = {
    "close": ([0.3, 0.25, 0.2, 0.15, 0.1], [0.25, 0.3, 0.2, 0.2, 0.05]),
    "far": ([0.7, 0.1, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.1, 0.7]),
    "teacher excludes": ([0.4, 0.3, 0.1, 0.1, 0.1], [0.0, 0.5, 0.0, 0.25, 0.25]),
    "student excludes": ([0.0, 0.0, 0.5, 0.25, 0.25], [0.2, 0.3, 0.1, 0.1, 0.3]),
    "disjoint": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.2, 0.6]),
    "one token": ([0.0, 1.0, 0.0, 0.0, 0.0], [0.1, 0.6, 0.1, 0.1, 0.1]),
    "equal": ([0.3, 0.25, 0.2, 0.15, 0.1], [0.3, 0.25, 0.2, 0.15, 0.1]),
}


def addresses(count: int) -> Address:
    """`count` addresses, a square of prompts and positions."""
    side = round(count**0.5)
    key = row_keys(7, [Prompt((1,), prompt_id) for prompt_id in range(side)])
    return Address(key.repeat_interleave(side), torch.arange(side).repeat(side))


def drafted(student_logp: Tensor, address: Address, greedy: bool = False) -> Draft:
    return Draft(student_proposal(student_logp, address, greedy=greedy), student_logp, address)


def follows(tokens: Tensor, probabilities: Tensor) -> bool:
    """Whether counts follow the probabilities (chi-square), and nothing impossible was drawn."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    if counts[~possible].any():
        return False
    expected = probabilities[possible].double() / probabilities.double().sum() * counts.sum()
    return possible.sum() == 1 or stats.chisquare(counts[possible], expected).pvalue > ALPHA


def by_writer(policy: Policy, student: list[float], teacher: list[float]) -> ByWriter:
    """The probability of each token and writer under a blend, from its definition."""
    match policy:
        case Mix():
            return mixed(student, teacher, policy.teacher_share)
        case Interleave():
            return interleaved(student, teacher, policy.keep_top_k)
        case _:
            assert isinstance(policy, TrustRegionBlend)
            return coupled(student, trust_region(student, teacher, policy.budget))
