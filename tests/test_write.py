"""What is written under a law: tokens, their writers, and the numbers that a rollout records of them.

The joint law of token and writer is that of each algorithm as its paper puts it: first who writes, then what.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from draws import ALPHA, DRAWS, PAIRS, addresses, by_writer, drafted, follows
from reference.policies import law_of, teacher_part, trust_region
from switchkd.records import Sampling
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Blend, Decision, Policy, Student, Teacher
from switchkd.rollout.log import compare, observe
from switchkd.rollout.policies import Switch
from switchkd.rollout.write import Written, write

BLENDS = [Mix(0.4), Mix(1.0), Interleave(1), Interleave(2), TrustRegionBlend(0.1), TrustRegionBlend(0.8)]
BLEND_IDS = [str(policy) for policy in BLENDS]


def written(policy: Policy, student: list[float], teacher: list[float], count: int = DRAWS) -> Written:
    """What the policy writes at `count` addresses where the models have these distributions, in float32."""
    student_logp, teacher_logp = (torch.tensor([p]).log() for p in (student, teacher))
    draft, everyones = drafted(student_logp.expand(count, -1), addresses(count)), teacher_logp.expand(count, -1)
    # A law depends on the distributions alone, which are the same everywhere.
    decision = policy.decide(
        observe(policy, draft.rows(slice(1)), compare(draft.rows(slice(1)), teacher_logp), [], Sampling())
    )
    assert decision.blend is not None
    mass = decision.blend.teacher_mass
    blend = Blend(decision.blend.logp.expand(count, -1), None if mass is None else mass.expand(count))
    everywhere = Decision(decision.by_teacher.expand(count), decision.threshold.expand(count), blend)
    return write(everywhere, draft, compare(draft, everyones), greedy=False)


def agrees_with_its_mean(values: Tensor, mean: float) -> bool:
    """Whether the values of independent draws, each from 0 to 1, have this mean."""
    error = float(values.double().mean()) - mean
    deviation = float(values.double().std()) / math.sqrt(len(values))
    # A constant has the roundings of float32 alone.
    return abs(error) <= stats.norm.isf(ALPHA / 2) * deviation + 1e-6


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
@pytest.mark.parametrize("policy", BLENDS, ids=BLEND_IDS)
def test_token_and_writer_follow_their_joint_law(policy: Policy, student: list[float], teacher: list[float]) -> None:
    joint = by_writer(policy, student, teacher)
    found = written(policy, student, teacher)
    probabilities = torch.tensor(joint, dtype=torch.float64)
    # The reference's roundings are no probabilities.
    assert follows(
        found.token + len(student) * found.by_teacher, probabilities.masked_fill(probabilities < 1e-12, 0).flatten()
    )
    shares = teacher_part(joint)
    part = found.teacher_part.double()
    assert ((part >= 0) & (part <= 1)).all()
    # A quotient in float32, and of the blend whose exponent is known to 1e-6; log-ratios here are below 3.
    expected = torch.tensor(shares, dtype=torch.float64)[found.token]
    torch.testing.assert_close(part, expected, atol=5e-6, rtol=0)
    assert agrees_with_its_mean(part, sum(joint[1]))
    # Given the tokens, the writers are coins.
    error, variance = float((found.by_teacher.double() - part).sum()), float((part * (1 - part)).sum())
    assert abs(error) <= stats.norm.isf(ALPHA / 2) * math.sqrt(variance) + 1e-6 * DRAWS


@pytest.mark.parametrize(("student", "teacher"), list(PAIRS.values()), ids=list(PAIRS))
@pytest.mark.parametrize("policy", BLENDS, ids=BLEND_IDS)
def test_the_log_probabilities_are_those_of_the_token_under_the_models_and_the_law(
    policy: Policy, student: list[float], teacher: list[float]
) -> None:
    found = written(policy, student, teacher, 400)
    law = law_of(by_writer(policy, student, teacher))
    for logp, distribution in ((found.student_logp, student), (found.teacher_logp, teacher), (found.law_logp, law)):
        expected = torch.tensor(distribution)[found.token]
        torch.testing.assert_close(logp.exp(), expected, atol=5e-6, rtol=0)  # as above


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_the_mean_part_of_a_mixture_is_its_share(share: float) -> None:
    for student, teacher in PAIRS.values():
        found = written(Mix(share), student, teacher)
        assert agrees_with_its_mean(found.teacher_part, share)
        assert stats.binomtest(int(found.by_teacher.sum()), DRAWS, share).pvalue > ALPHA


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_a_trust_region_replaces_as_often_as_its_law_is_far_from_the_student(budget: float) -> None:
    for student, teacher in PAIRS.values():
        found = written(TrustRegionBlend(budget), student, teacher)
        law = trust_region(student, teacher, budget)
        distance = sum(abs(q - s) for q, s in zip(law, student, strict=True)) / 2
        assert torch.equal(found.by_teacher, found.replaced)
        assert agrees_with_its_mean(found.teacher_part, distance)
        # The exponent is known to 1e-6, so the distance nearly so.
        assert (
            abs(int(found.replaced.sum()) - DRAWS * distance)
            <= stats.norm.isf(ALPHA / 2) * math.sqrt(DRAWS * distance * (1 - distance)) + 1e-5 * DRAWS
        )


def test_a_teacher_may_be_the_writer_of_a_proposal_that_stands() -> None:
    """Of a mixture the proposal is kept more often than the coin falls to the student."""
    found = written(Mix(0.4), *PAIRS["close"], count=400)
    assert (found.by_teacher & ~found.replaced).any()
    assert (~found.by_teacher & found.replaced).any()


def random_logps(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(count, size, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (torch.log_softmax(each, dim=-1).to(dtype) for each in logits)
    return first, second


@pytest.mark.parametrize("policy", [Mix(0.3), Mix(0.7), Interleave(1), Interleave(2), TrustRegionBlend(0.1)])
def test_no_rounding_makes_a_part_that_is_no_probability(policy: Policy) -> None:
    """Tokens that one of the two all but excludes have a part of 0 or 1, which rounds to either side."""
    student_logp, teacher_logp = random_logps(10_000, 9, torch.float32)
    draft = drafted(student_logp, addresses(10_000))
    compared = compare(draft, teacher_logp)
    decision = policy.decide(observe(policy, draft, compared, [], Sampling()))
    found = write(decision, draft, compared, greedy=False)
    assert float(found.teacher_part.min()) >= 0
    assert float(found.teacher_part.max()) <= 1
    assert decision.blend is not None
    if decision.blend.teacher_mass is not None:
        unclamped = decision.blend.teacher_mass * (found.teacher_logp - found.law_logp).exp()
        assert float(unclamped.max()) > 1  # else this test shows nothing
    else:
        assert float(found.teacher_part.max()) > 0
        assert float((found.student_logp - found.law_logp).max()) > 0


@pytest.mark.parametrize("policy", [Student(), Teacher(), Switch(threshold=0.05, decay="constant")])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_law_that_is_one_models_has_its_numbers(policy: Policy, greedy: bool) -> None:
    student_logp, teacher_logp = random_logps(400, 9, torch.float64)
    teacher_logp = torch.log_softmax(student_logp + 0.1 * teacher_logp, dim=-1)
    draft = drafted(student_logp, addresses(400), greedy)
    compared = compare(draft, teacher_logp)
    decision = policy.decide(observe(policy, draft, compared, [], Sampling(temperature=0.0 if greedy else 1.0)))
    found = write(decision, draft, compared, greedy=greedy)
    assert torch.equal(found.by_teacher, decision.by_teacher)
    assert set(found.by_teacher.tolist()) == {Student: {False}, Teacher: {True}, Switch: {True, False}}[type(policy)]
    assert torch.equal(found.law_logp, torch.where(found.by_teacher, found.teacher_logp, found.student_logp))
    assert torch.equal(found.teacher_part, found.by_teacher.double())
    assert torch.equal(found.replaced, found.token != draft.proposal)
    assert not (found.replaced & ~found.by_teacher).any()


@pytest.mark.parametrize("mass", [None, 0.5])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_blend_writes_only_where_the_policy_says(mass: float | None, greedy: bool) -> None:
    """Elsewhere the token is the student's proposal, whatever the blend and the coin."""
    student_logp, teacher_logp = random_logps(400, 9, torch.float64)
    draft = drafted(student_logp, addresses(400), greedy)
    somewhere = torch.arange(400) % 3 == 0
    masses = None if mass is None else torch.full((400,), mass, dtype=torch.float64)
    law_logp = torch.logaddexp(student_logp, teacher_logp) + math.log(0.5)
    decision = Decision(somewhere, torch.full((400,), math.nan), Blend(law_logp, masses))
    compared = compare(draft, teacher_logp)._replace(coin=torch.zeros(400))
    found = write(decision, draft, compared, greedy=greedy)
    rest = ~somewhere
    assert torch.equal(found.token[rest], draft.proposal[rest])
    assert torch.equal(found.law_logp[rest], found.student_logp[rest])
    assert not found.by_teacher[rest].any()
    assert not found.teacher_part[rest].any()
    assert not found.replaced[rest].any()
    at_token = law_logp.gather(-1, found.token[:, None])[:, 0]
    assert torch.equal(found.law_logp[somewhere], at_token[somewhere])
    assert found.by_teacher[somewhere].any()


@pytest.mark.parametrize("policy", BLENDS, ids=BLEND_IDS)
def test_greedy_takes_the_likeliest_token_of_the_law(policy: Policy) -> None:
    """SKD's greedy: the student's best if it is among the teacher's, else the teacher's; the others': the law's best."""
    student_logp, teacher_logp = random_logps(324, 9, torch.float64)
    teacher_logp = torch.log_softmax(0.5 * (student_logp + teacher_logp), dim=-1)
    draft = drafted(student_logp, addresses(324), greedy=True)
    compared = compare(draft, teacher_logp)
    positions = observe(policy, draft, compared, [], Sampling(temperature=0))
    found = write(policy.decide(positions), draft, compared, greedy=True)
    assert torch.equal(found.replaced, found.token != draft.proposal)
    wrote: set[bool] = set()
    for at in range(324):
        student, teacher = (logp[at].exp().tolist() for logp in (student_logp, teacher_logp))
        token, by_teacher = int(found.token[at]), bool(found.by_teacher[at])
        if isinstance(policy, Interleave):
            best = student.index(max(student))
            assert by_teacher == (sum(t > teacher[best] for t in teacher) >= policy.keep_top_k)
            assert token == (teacher.index(max(teacher)) if by_teacher else best)
        else:
            law = law_of(by_writer(policy, student, teacher))
            assert token == law.index(max(law))
            if isinstance(policy, TrustRegionBlend):
                assert by_teacher == (token != int(draft.proposal[at]))
        wrote.add(by_teacher)
    assert wrote == ({True} if policy == Mix(1.0) else {True, False})
