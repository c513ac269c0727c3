"""The coupled draw: the teacher's token is drawn from the teacher, and is the proposal as often as any rule can make it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from switchkd.distributions.draw import independent_token, student_proposal, teacher_token
from switchkd.distributions.noise import Address, row_keys
from switchkd.records import Prompt

# The chance that a right implementation fails a statistical test; on these fixed addresses it passes for good.
ALPHA = 1e-4
DRAWS = 40_000

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


def draw(student: list[float], teacher: list[float], count: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Proposals and teacher's tokens at `count` addresses."""
    address = addresses(count)
    student_logp, teacher_logp = (torch.tensor(p).log().expand(len(address.key), len(p)) for p in (student, teacher))
    proposal = student_proposal(student_logp, address, greedy=False)
    return proposal, teacher_token(proposal, student_logp, teacher_logp, address, greedy=False)


def follows(tokens: Tensor, probabilities: Tensor) -> bool:
    """Whether counts follow the probabilities (chi-square), and nothing impossible was drawn."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    if counts[~possible].any():
        return False
    expected = probabilities[possible].double() / probabilities.double().sum() * counts.sum()
    return possible.sum() == 1 or stats.chisquare(counts[possible], expected).pvalue > ALPHA


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
def test_the_proposal_is_drawn_from_the_student_and_the_token_from_the_teacher(
    student: list[float], teacher: list[float]
) -> None:
    proposal, token = draw(student, teacher)
    assert follows(proposal, torch.tensor(student))
    assert follows(token, torch.tensor(teacher))


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
def test_proposal_and_token_follow_the_joint_law_of_the_maximal_coupling(
    student: list[float], teacher: list[float]
) -> None:
    """Equal with probability 1 - TV; where not, an excess of the student is replaced by one of the teacher's."""
    p_S, p_T = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    joint = torch.diag(torch.minimum(p_S, p_T))
    distance = (p_T - p_S).clamp(min=0).sum()
    if distance > 0:
        joint += torch.outer((p_S - p_T).clamp(min=0), (p_T - p_S).clamp(min=0)) / distance
    proposal, token = draw(student, teacher)
    assert follows(proposal * 5 + token, joint.flatten())
    agreed = int((proposal == token).sum())
    assert stats.binomtest(agreed, len(token), float(1 - distance)).pvalue > ALPHA


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
def test_an_independent_token_follows_the_product_law_with_the_proposal(
    student: list[float], teacher: list[float]
) -> None:
    proposal, _ = draw(student, teacher)
    teacher_logp = torch.tensor(teacher).log().expand(len(proposal), 5)
    token = independent_token(teacher_logp, addresses(DRAWS), greedy=False)
    assert follows(proposal * 5 + token, torch.outer(torch.tensor(student), torch.tensor(teacher)).flatten())
    assert (independent_token(teacher_logp, addresses(DRAWS), greedy=True) == teacher.index(max(teacher))).all()


def test_identical_distributions_never_replace() -> None:
    address = addresses(DRAWS)
    logits = torch.randn(len(address.key), 50, generator=torch.Generator().manual_seed(0)) * 3
    logp = torch.log_softmax(logits, dim=-1)
    proposal = student_proposal(logp, address, greedy=False)
    assert torch.equal(teacher_token(proposal, logp, logp, address, greedy=False), proposal)


def test_greedy_is_the_argmax_of_each() -> None:
    address = addresses(400)
    generator = torch.Generator().manual_seed(0)
    student_logp, teacher_logp = (torch.log_softmax(torch.randn(400, 9, generator=generator), dim=-1) for _ in range(2))
    proposal = student_proposal(student_logp, address, greedy=True)
    assert torch.equal(proposal, student_logp.argmax(dim=-1))
    token = teacher_token(proposal, student_logp, teacher_logp, address, greedy=True)
    assert torch.equal(token, teacher_logp.argmax(dim=-1))


def test_a_proposal_that_the_teacher_excludes_is_always_replaced() -> None:
    address = addresses(DRAWS)
    student_logp = torch.tensor([0.9, 0.05, 0.05]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.5, 0.5]).log().expand(DRAWS, 3)
    proposal = torch.zeros(DRAWS, dtype=torch.long)
    assert (teacher_token(proposal, student_logp, teacher_logp, address, greedy=False) != proposal).all()


def test_a_proposal_that_the_teacher_excludes_is_replaced_though_its_share_is_lost_in_rounding() -> None:
    """The rest of the two distributions is equal in float32, so there is no excess to draw from."""
    address = addresses(DRAWS)
    student_logp = torch.tensor([1e-12, 0.25, 0.75]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.25, 0.75]).log().expand(DRAWS, 3)
    proposal = torch.zeros(DRAWS, dtype=torch.long)
    token = teacher_token(proposal, student_logp, teacher_logp, address, greedy=False)
    assert follows(token, teacher_logp[0].exp())


def test_a_block_of_positions_is_drawn_as_its_positions_are() -> None:
    generator = torch.Generator().manual_seed(0)
    student_logp, teacher_logp = (
        torch.log_softmax(torch.randn(6, 5, 11, generator=generator) * 2, dim=-1) for _ in range(2)
    )
    key = row_keys(0, [Prompt((1,), prompt_id) for prompt_id in range(6)])
    block = Address(key[:, None].expand(6, 5), torch.arange(5).expand(6, 5))
    proposal = student_proposal(student_logp, block, greedy=False)
    token = teacher_token(proposal, student_logp, teacher_logp, block, greedy=False)
    assert (token != proposal).any()
    for column in range(5):
        address = Address(key, torch.full_like(key, column))
        alone = student_proposal(student_logp[:, column], address, greedy=False)
        assert torch.equal(alone, proposal[:, column])
        coupled = teacher_token(alone, student_logp[:, column], teacher_logp[:, column], address, greedy=False)
        assert torch.equal(coupled, token[:, column])


def test_a_row_is_drawn_the_same_alone_and_beside_others() -> None:
    address = addresses(100)
    generator = torch.Generator().manual_seed(1)
    student_logp, teacher_logp = (
        torch.log_softmax(torch.randn(100, 11, generator=generator) * 2, dim=-1) for _ in range(2)
    )
    proposal = student_proposal(student_logp, address, greedy=False)
    token = teacher_token(proposal, student_logp, teacher_logp, address, greedy=False)
    for row in range(100):
        one = torch.tensor([row])
        alone = teacher_token(proposal[one], student_logp[one], teacher_logp[one], address.at(one), greedy=False)
        assert torch.equal(alone, token[one])
