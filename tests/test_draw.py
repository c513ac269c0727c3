"""The draws: both follow their laws, and the token coupled to the proposal is the proposal as often as any rule can make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from draws import ALPHA, DRAWS, PAIRS, addresses, drafted, follows
from switchkd.distributions import draw
from switchkd.distributions.draw import Draft, written_tokens
from switchkd.distributions.noise import Address, Stream, gumbel, row_keys, uniform
from switchkd.records import Prompt

# Laws of two kinds beside each student: the teacher's, and one between the two models'.
LAWS = {
    f"{name}, {law}": (student, [round(share * t + (1 - share) * s, 12) for s, t in zip(student, teacher, strict=True)])
    for name, (student, teacher) in PAIRS.items()
    for law, share in (("teacher", 1.0), ("mixture", 0.3))
}


def law_token(draft: Draft, law_logp: Tensor, *, greedy: bool = False) -> Tensor:
    """The tokens of a law that is not the student's anywhere."""
    everywhere = torch.ones_like(draft.proposal, dtype=torch.bool)
    return written_tokens(draft, law_logp, everywhere, greedy=greedy)[0]


def proposal_and_token(student: list[float], law: list[float]) -> tuple[Tensor, Tensor]:
    """Proposals and the law's tokens at `DRAWS` addresses."""
    student_logp, law_logp = (torch.tensor(p).log().expand(DRAWS, len(p)) for p in (student, law))
    draft = drafted(student_logp, addresses(DRAWS))
    return draft.proposal, law_token(draft, law_logp)


def random_logps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two models' log-probabilities of that shape."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.log_softmax(torch.randn(shape, generator=generator) * 2, dim=-1) for _ in range(2))
    return first, second


@pytest.mark.parametrize(("student", "law"), list(LAWS.values()), ids=list(LAWS))
def test_the_proposal_is_drawn_from_the_student_and_the_token_from_the_law(
    student: list[float], law: list[float]
) -> None:
    proposal, token = proposal_and_token(student, law)
    assert follows(proposal, torch.tensor(student))
    assert follows(token, torch.tensor(law))


@pytest.mark.parametrize(("student", "law"), list(LAWS.values()), ids=list(LAWS))
def test_proposal_and_token_follow_the_joint_law_of_the_maximal_coupling(
    student: list[float], law: list[float]
) -> None:
    """Equal with probability 1 - TV; where not, an excess of the student is replaced by one of the law's."""
    p_S, q = torch.tensor(student, dtype=torch.float64), torch.tensor(law, dtype=torch.float64)
    joint = torch.diag(torch.minimum(p_S, q))
    distance = (q - p_S).clamp(min=0).sum()
    if distance > 0:
        joint += torch.outer((p_S - q).clamp(min=0), (q - p_S).clamp(min=0)) / distance
    proposal, token = proposal_and_token(student, law)
    assert follows(proposal * 5 + token, joint.flatten())
    agreed = int((proposal == token).sum())
    # Sums of float64 may pass 1 by a rounding.
    assert stats.binomtest(agreed, len(token), min(1.0, float(1 - distance))).pvalue > ALPHA


def test_identical_distributions_never_replace() -> None:
    address = addresses(DRAWS)
    logits = torch.randn(len(address.key), 50, generator=torch.Generator().manual_seed(0)) * 3
    logp = torch.log_softmax(logits, dim=-1)
    draft = drafted(logp, address)
    assert torch.equal(law_token(draft, logp), draft.proposal)


def test_greedy_is_the_argmax_of_each() -> None:
    student_logp, teacher_logp = random_logps(400, 9)
    draft = drafted(student_logp, addresses(400), greedy=True)
    assert torch.equal(draft.proposal, student_logp.argmax(dim=-1))
    token = law_token(draft, teacher_logp, greedy=True)
    assert torch.equal(token, teacher_logp.argmax(dim=-1))


@pytest.mark.parametrize("greedy", [False, True])
def test_where_the_student_writes_its_proposal_stands(greedy: bool) -> None:
    student_logp, teacher_logp = random_logps(400, 9)
    draft = drafted(student_logp, addresses(400), greedy=greedy)
    by_teacher = torch.arange(400) % 3 == 0
    token, replaced = written_tokens(draft, teacher_logp, by_teacher, greedy=greedy)
    everywhere = law_token(draft, teacher_logp, greedy=greedy)
    assert torch.equal(token, torch.where(by_teacher, everywhere, draft.proposal))
    assert torch.equal(replaced, token != draft.proposal)
    assert replaced.any()
    assert (by_teacher & ~replaced).any()


def test_a_proposal_that_the_teacher_excludes_is_always_replaced() -> None:
    address = addresses(DRAWS)
    student_logp = torch.tensor([0.9, 0.05, 0.05]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.5, 0.5]).log().expand(DRAWS, 3)
    draft = Draft(torch.zeros(DRAWS, dtype=torch.long), student_logp, address)
    assert (law_token(draft, teacher_logp) != draft.proposal).all()


def test_a_proposal_that_the_teacher_excludes_is_replaced_though_its_share_is_lost_in_rounding() -> None:
    """The rest of the two distributions is equal in float32, so there is no excess to draw from."""
    address = addresses(DRAWS)
    student_logp = torch.tensor([1e-12, 0.25, 0.75]).log().expand(DRAWS, 3)
    teacher_logp = torch.tensor([0.0, 0.25, 0.75]).log().expand(DRAWS, 3)
    token = law_token(Draft(torch.zeros(DRAWS, dtype=torch.long), student_logp, address), teacher_logp)
    assert follows(token, teacher_logp[0].exp())


def block_address(rows: int, positions: int) -> Address:
    key = row_keys(0, [Prompt((1,), prompt_id) for prompt_id in range(rows)])
    return Address(key[:, None].expand(rows, positions), torch.arange(positions).expand(rows, positions))


@pytest.mark.parametrize("greedy", [False, True])
def test_a_block_is_drawn_as_its_positions_are_up_to_the_first_replaced(greedy: bool) -> None:
    student_logp, teacher_logp = random_logps(60, 5, 11)
    # Nearer to the student than another random distribution, so that blocks end at every place, and not at all.
    teacher_logp = torch.log_softmax(student_logp + 0.3 * teacher_logp, dim=-1)
    draft = drafted(student_logp, block_address(60, 5), greedy=greedy)
    by_teacher = torch.rand(60, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    token, replaced = written_tokens(draft, teacher_logp, by_teacher, greedy=greedy)
    alone, alone_replaced = torch.empty_like(token), torch.empty_like(replaced)
    for column in range(5):
        at = (slice(None), column)
        single = drafted(student_logp[at], draft.address.at(at), greedy=greedy)
        assert torch.equal(single.proposal, draft.proposal[at])
        alone[at], alone_replaced[at] = written_tokens(single, teacher_logp[at], by_teacher[at], greedy=greedy)
    # Made beforehand, and for all rows at once, as where graphs draw.
    made: dict[str, Any] = {"keep": uniform(draft.address, Stream.KEEP), "noise": gumbel}
    for given, same in zip(
        written_tokens(draft, teacher_logp, by_teacher, greedy=greedy, **made), (token, replaced), strict=True
    ):
        assert torch.equal(given, same)
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
    assert torch.equal(law_token(draft, student_logp), draft.proposal)
    assert sum(made) == 0
    token = law_token(draft, teacher_logp)
    assert sum(made) == int((token != draft.proposal).any(dim=1).sum()) == 6


def test_a_row_is_drawn_the_same_alone_and_beside_others() -> None:
    student_logp, teacher_logp = random_logps(100, 11, seed=1)
    draft = drafted(student_logp, addresses(100))
    token = law_token(draft, teacher_logp)
    for row in range(100):
        single = slice(row, row + 1)
        assert torch.equal(law_token(draft.rows(single), teacher_logp[single]), token[single])
