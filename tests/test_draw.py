"""The draws: both follow their laws, and the teacher's coupled token is the proposal as often as any rule can make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from switchkd.distributions import draw
from switchkd.distributions.draw import Draft, student_proposal, written_tokens
from switchkd.distributions.noise import Address, gumbel, row_keys
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


def drafted(student_logp: Tensor, address: Address, greedy: bool = False) -> Draft:
    return Draft(student_proposal(student_logp, address, greedy=greedy), student_logp, address)


def teacher_token(draft: Draft, teacher_logp: Tensor, *, greedy: bool = False, independent: bool = False) -> Tensor:
    """The tokens of a teacher that writes everywhere."""
    everywhere = torch.ones_like(draft.proposal, dtype=torch.bool)
    return written_tokens(draft, teacher_logp, everywhere, greedy=greedy, independent=independent)[0]


def proposal_and_token(
    student: list[float], teacher: list[float], *, independent: bool = False
) -> tuple[Tensor, Tensor]:
    """Proposals and teacher's tokens at `DRAWS` addresses."""
    student_logp, teacher_logp = (torch.tensor(p).log().expand(DRAWS, len(p)) for p in (student, teacher))
    draft = drafted(student_logp, addresses(DRAWS))
    return draft.proposal, teacher_token(draft, teacher_logp, independent=independent)


def random_logps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two models' log-probabilities of that shape."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.log_softmax(torch.randn(shape, generator=generator) * 2, dim=-1) for _ in range(2))
    return first, second


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
    proposal, token = proposal_and_token(student, teacher)
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
    proposal, token = proposal_and_token(student, teacher)
    assert follows(proposal * 5 + token, joint.flatten())
    agreed = int((proposal == token).sum())
    assert stats.binomtest(agreed, len(token), float(1 - distance)).pvalue > ALPHA


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
def test_an_independent_token_follows_the_product_law_with_the_proposal(
    student: list[float], teacher: list[float]
) -> None:
    proposal, token = proposal_and_token(student, teacher, independent=True)
    assert follows(proposal * 5 + token, torch.outer(torch.tensor(student), torch.tensor(teacher)).flatten())


def test_identical_distributions_never_replace() -> None:
    address = addresses(DRAWS)
    logits = torch.randn(len(address.key), 50, generator=torch.Generator().manual_seed(0)) * 3
    logp = torch.log_softmax(logits, dim=-1)
    draft = drafted(logp, address)
    assert torch.equal(teacher_token(draft, logp), draft.proposal)


@pytest.mark.parametrize("independent", [False, True])
def test_greedy_is_the_argmax_of_each(independent: bool) -> None:
    student_logp, teacher_logp = random_logps(400, 9)
    draft = drafted(student_logp, addresses(400), greedy=True)
    assert torch.equal(draft.proposal, student_logp.argmax(dim=-1))
    token = teacher_token(draft, teacher_logp, greedy=True, independent=independent)
    assert torch.equal(token, teacher_logp.argmax(dim=-1))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_where_the_student_writes_its_proposal_stands(independent: bool, greedy: bool) -> None:
    student_logp, teacher_logp = random_logps(400, 9)
    draft = drafted(student_logp, addresses(400), greedy=greedy)
    by_teacher = torch.arange(400) % 3 == 0
    token, replaced = written_tokens(draft, teacher_logp, by_teacher, greedy=greedy, independent=independent)
    everywhere = teacher_token(draft, teacher_logp, greedy=greedy, independent=independent)
    assert torch.equal(token, torch.where(by_teacher, everywhere, draft.proposal))
    assert torch.equal(replaced, token != draft.proposal)
    assert replaced.any()
    assert (by_teacher & ~replaced).any()


def test_a_proposal_that_the_teacher_excludes_is_always_replaced() -> None:
    address = addresses(DRAWS)
    student_logp = torch.tensor([0.9, 0.05, 0.05]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.5, 0.5]).log().expand(DRAWS, 3)
    draft = Draft(torch.zeros(DRAWS, dtype=torch.long), student_logp, address)
    assert (teacher_token(draft, teacher_logp) != draft.proposal).all()


def test_a_proposal_that_the_teacher_excludes_is_replaced_though_its_share_is_lost_in_rounding() -> None:
    """The rest of the two distributions is equal in float32, so there is no excess to draw from."""
    address = addresses(DRAWS)
    student_logp = torch.tensor([1e-12, 0.25, 0.75]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.25, 0.75]).log().expand(DRAWS, 3)
    token = teacher_token(Draft(torch.zeros(DRAWS, dtype=torch.long), student_logp, address), teacher_logp)
    assert follows(token, teacher_logp[0].exp())


def block_address(rows: int, positions: int) -> Address:
    key = row_keys(0, [Prompt((1,), prompt_id) for prompt_id in range(rows)])
    return Address(key[:, None].expand(rows, positions), torch.arange(positions).expand(rows, positions))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_a_block_is_drawn_as_its_positions_are_up_to_the_first_replaced(independent: bool, greedy: bool) -> None:
    student_logp, teacher_logp = random_logps(60, 5, 11)
    # Nearer to the student than another random distribution, so that blocks end at every place, and not at all.
    teacher_logp = torch.log_softmax(student_logp + 0.3 * teacher_logp, dim=-1)
    draft = drafted(student_logp, block_address(60, 5), greedy=greedy)
    by_teacher = torch.rand(60, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    token, replaced = written_tokens(draft, teacher_logp, by_teacher, greedy=greedy, independent=independent)
    alone, alone_replaced = torch.empty_like(token), torch.empty_like(replaced)
    for column in range(5):
        at = (slice(None), column)
        single = drafted(student_logp[at], draft.address.at(at), greedy=greedy)
        assert torch.equal(single.proposal, draft.proposal[at])
        alone[at], alone_replaced[at] = written_tokens(
            single, teacher_logp[at], by_teacher[at], greedy=greedy, independent=independent
        )
    counted = alone_replaced.cumsum(dim=1) - alone_replaced.long() == 0
    assert torch.equal(token[counted], alone[counted])
    assert torch.equal(replaced[counted], alone_replaced[counted])
    assert set(counted.sum(dim=1).tolist()) == {1, 2, 3, 4, 5}


def test_no_noise_is_made_for_tokens_that_are_kept_or_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(address: Address, *arguments: Any) -> Tensor:
        made.append(address.key.numel())
        return gumbel(address, *arguments)

    student_logp, teacher_logp = random_logps(6, 5, 11)
    draft = drafted(student_logp, block_address(6, 5))
    monkeypatch.setattr(draw, "gumbel", counting)
    assert torch.equal(teacher_token(draft, student_logp), draft.proposal)
    assert made == []
    token = teacher_token(draft, teacher_logp)
    assert made == [int((token != draft.proposal).any(dim=1).sum())] == [6]


def test_a_row_is_drawn_the_same_alone_and_beside_others() -> None:
    student_logp, teacher_logp = random_logps(100, 11, seed=1)
    draft = drafted(student_logp, addresses(100))
    token = teacher_token(draft, teacher_logp)
    for row in range(100):
        single = slice(row, row + 1)
        assert torch.equal(teacher_token(draft.rows(single), teacher_logp[single]), token[single])
