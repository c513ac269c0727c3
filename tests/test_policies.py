"""Who writes: thresholds against their formulas, decisions element by element, and refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from draws import PAIRS
from reference.policies import (
    adaswitch,
    blended,
    interleaved,
    is_among_best,
    law_of,
    mixed,
    relative_entropy,
    trust_region,
)
from switchkd.errors import UserError
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend, trust_region_blend
from switchkd.rollout.law import Decision, Policy, Positions, Student, Teacher
from switchkd.rollout.policies import DECAYS, POLICIES, POLICY, AdaSwitch, Early, Late, Switch

FORMULAS = {
    "exponential": lambda first, rate, t: first * math.exp(-rate * t),
    "linear": lambda first, rate, t: first * max(0.0, 1 - rate * t),
    "constant": lambda first, rate, t: first,
}


def decide(policy: Policy, position: Tensor, divergence: Tensor, max_new_tokens: int = 256) -> Decision:
    return policy.decide(seen(position, divergence=divergence, max_new_tokens=max_new_tokens))


def seen(position: Tensor, max_new_tokens: int = 256, greedy: bool = False, **given: Tensor) -> Positions:
    """Positions of which a test gives what its policy looks at."""
    logp = torch.log_softmax(torch.zeros(*position.shape, 3), dim=-1)
    anything = {"student_logp": logp, "teacher_logp": logp}
    numbers = dict.fromkeys(("divergence", "coin"), torch.full(position.shape, 0.5))
    return Positions(position, max_new_tokens=max_new_tokens, greedy=greedy, **{**anything, **numbers, **given})


def test_there_is_a_formula_for_every_decay() -> None:
    assert set(FORMULAS) == set(DECAYS)


@pytest.mark.parametrize("decay", FORMULAS)
@given(
    threshold=st.floats(0, 1), rate=st.floats(0, 2), position=st.integers(0, 5000), max_new_tokens=st.integers(1, 5000)
)
def test_thresholds_follow_the_formula_at_a_given_rate(
    decay: str, threshold: float, rate: float, position: int, max_new_tokens: int
) -> None:
    switch = Switch(threshold=threshold, decay_rate=rate, decay=decay)
    value = switch.thresholds(torch.tensor([position]), max_new_tokens)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(FORMULAS[decay](threshold, rate, position), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("decay", ["exponential", "linear"])
@given(fraction=st.floats(0.001, 1), max_new_tokens=st.integers(2, 2000))
def test_the_final_fraction_is_reached_at_the_last_position(decay: str, fraction: float, max_new_tokens: int) -> None:
    switch = Switch(threshold=0.4, final_fraction=fraction, decay=decay)
    first, last = switch.thresholds(torch.tensor([0, max_new_tokens - 1]), max_new_tokens).tolist()
    assert first == 0.4
    assert last == pytest.approx(0.4 * fraction, rel=1e-9)  # the rate is a quotient, multiplied again by up to 2000
    middle = switch.thresholds(torch.arange(max_new_tokens), max_new_tokens)
    rate = switch.rate(max_new_tokens)
    expected = [FORMULAS[decay](0.4, rate, t) for t in range(max_new_tokens)]
    assert middle.tolist() == pytest.approx(expected, rel=1e-12)
    assert (middle.diff() <= 0).all()


def test_the_two_readings_of_the_decay_factor_agree_where_they_should() -> None:
    """exp(-lambda (n - 1)) = fraction."""
    by_rate = Switch(decay_rate=math.log(10) / 99)
    by_fraction = Switch(final_fraction=0.1)
    position = torch.arange(100)
    torch.testing.assert_close(by_rate.thresholds(position, 100), by_fraction.thresholds(position, 100))


def test_by_default_the_threshold_falls_to_a_tenth() -> None:
    switch = Switch()
    first, last = switch.thresholds(torch.tensor([0, 127]), 128).tolist()
    assert last == pytest.approx(first / 10)
    assert Switch(decay_rate=0.02).rate(128) == 0.02


def test_a_single_token_has_no_last_position_to_decay_to() -> None:
    assert Switch(threshold=0.3).thresholds(torch.tensor([0]), 1).tolist() == [0.3]


def test_a_constant_threshold_does_not_move() -> None:
    assert Switch(threshold=0.2, decay="constant").thresholds(torch.arange(9), 9).tolist() == [0.2] * 9


# ------------------------------------------------------------------------------------------------------------ decisions


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_each_position_is_decided_by_itself(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(0, 100, shape, generator=generator)
    divergence = torch.rand(shape, generator=generator) * math.log(2)
    switch = Switch(threshold=0.5, decay_rate=0.01)
    decision = decide(switch, position, divergence)
    assert decision.by_teacher.shape == decision.threshold.shape == shape
    assert decision.by_teacher.dtype == torch.bool
    for index, at in enumerate(position.flatten().tolist()):
        threshold = 0.5 * math.exp(-0.01 * at)
        assert float(decision.threshold.flatten()[index]) == pytest.approx(threshold, rel=1e-6)  # float32
        assert bool(decision.by_teacher.flatten()[index]) == (float(divergence.flatten()[index]) > threshold)
    assert decision.by_teacher.any()
    assert not decision.by_teacher.all()


def test_a_block_is_decided_as_its_positions_are() -> None:
    position = torch.arange(12).reshape(3, 4)
    divergence = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 0.7
    switch = Switch(threshold=0.4, decay_rate=0.05)
    block = decide(switch, position, divergence)
    for column in range(4):
        one = decide(switch, position[:, column], divergence[:, column])
        assert torch.equal(one.by_teacher, block.by_teacher[:, column])
        assert torch.equal(one.threshold, block.threshold[:, column])


def test_the_teacher_writes_above_the_threshold_and_not_at_it() -> None:
    switch = Switch(threshold=0.25, decay="constant")
    at, above = 0.25, math.nextafter(0.25, 1)
    decision = decide(switch, torch.tensor([0, 1]), torch.tensor([at, above], dtype=torch.float64))
    assert decision.by_teacher.tolist() == [False, True]


def test_threshold_0_gives_every_position_where_the_models_differ_to_the_teacher() -> None:
    decision = decide(Switch(threshold=0), torch.arange(3), torch.tensor([0.0, 1e-9, 0.6]))
    assert decision.by_teacher.tolist() == [False, True, True]


def test_a_threshold_above_ln_2_never_switches() -> None:
    largest = torch.full((4,), math.log(2))
    assert not decide(Switch(threshold=0.7, decay="constant"), torch.arange(4), largest).by_teacher.any()
    assert not decide(Switch(threshold=math.inf, decay="constant"), torch.arange(4), largest).by_teacher.any()


def test_a_linear_threshold_stops_at_0_and_then_the_teacher_writes() -> None:
    decision = decide(
        Switch(threshold=0.6, decay="linear", decay_rate=0.5), torch.tensor([0, 1, 2, 9]), torch.full((4,), 0.5)
    )
    assert decision.threshold.tolist() == pytest.approx([0.6, 0.3, 0, 0])
    assert decision.by_teacher.tolist() == [False, True, True, True]


@pytest.mark.parametrize(("policy", "by_teacher"), [(Student(), False), (Teacher(), True)])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_student_and_teacher_always_write_and_compare_with_nothing(
    policy: Policy, by_teacher: bool, shape: tuple[int, ...]
) -> None:
    decision = decide(policy, torch.zeros(shape, dtype=torch.long), torch.full(shape, 0.5))
    assert decision.by_teacher.shape == decision.threshold.shape == shape
    assert (decision.by_teacher == by_teacher).all()
    assert decision.threshold.isnan().all()
    assert policy.needs_teacher == by_teacher


# -------------------------------------------------------------------------------------------------------------- shares by position


@given(share=st.floats(0, 1), max_new_tokens=st.integers(1, 300))
def test_early_and_late_give_the_teacher_the_two_ends(share: float, max_new_tokens: int) -> None:
    count = round(share * max_new_tokens)
    position = torch.arange(max_new_tokens)
    early, late = (each(share).decide(seen(position, max_new_tokens)) for each in (Early, Late))
    assert early.by_teacher.tolist() == [True] * count + [False] * (max_new_tokens - count)
    assert late.by_teacher.tolist() == [False] * (max_new_tokens - count) + [True] * count
    assert early.threshold.isnan().all()
    assert late.threshold.isnan().all()


# --------------------------------------------------------------------------------------------- laws between the two models

# Ties at the edges of the top 2 and of the top 3, ids that the teacher excludes, and fewer possible ids than top_k.
TEACHERS = {
    "plain": [0.1, 0.4, 0.05, 0.3, 0.15],
    "ties": [0.2, 0.3, 0.2, 0.2, 0.1],
    "excludes": [0.5, 0.0, 0.5, 0.0, 0.0],
}
MODELS = [*PAIRS.values(), *(([0.3, 0.05, 0.25, 0.15, 0.25], teacher) for teacher in TEACHERS.values())]
# Of a probability up to 1, by a few roundings of its logarithm.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}


def law_in(
    policy: Policy, pairs: list[tuple[list[float], list[float]]], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The probabilities (len(pairs), V) that a policy decides on where positions of that shape have these distributions."""
    student_logp, teacher_logp = (
        torch.tensor(each, dtype=dtype).log().reshape(*shape, -1) for each in zip(*pairs, strict=True)
    )
    positions = seen(torch.zeros(shape, dtype=torch.long), student_logp=student_logp, teacher_logp=teacher_logp)
    decision = policy.decide(positions)
    assert decision.by_teacher.shape == decision.threshold.shape == shape
    assert decision.by_teacher.all()
    assert decision.threshold.isnan().all()
    assert decision.blend is not None
    assert decision.blend.logp.dtype == dtype
    assert decision.blend.logp.shape == student_logp.shape
    return decision.blend.logp.exp().reshape(len(pairs), -1)


SHAPES = [(len(MODELS),), (len(MODELS), 1), (2, len(MODELS) // 2)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mix_is_the_law_of_a_coin_between_the_models(share: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = law_in(Mix(share), MODELS, shape, dtype)
    expected = [law_of(mixed(student, teacher, share)) for student, teacher in MODELS]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), atol=ROUNDING[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 25])
def test_interleave_is_the_law_of_proposals_that_the_teacher_may_draw_anew(
    top_k: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = law_in(Interleave(top_k), MODELS, shape, dtype)
    expected = [law_of(interleaved(student, teacher, top_k)) for student, teacher in MODELS]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), atol=ROUNDING[dtype], rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)
def test_greedy_interleave_keeps_a_proposal_among_the_teachers_best(teacher: list[float], top_k: int) -> None:
    proposing = torch.full((5, 5), 0.1).fill_diagonal_(0.6).log()
    teacher_logp = torch.tensor(teacher).log().expand(5, 5)
    for shape in ((5,), (5, 1), (1, 5)):
        positions = seen(
            torch.zeros(shape, dtype=torch.long),
            greedy=True,
            student_logp=proposing.reshape(*shape, 5),
            teacher_logp=teacher_logp.reshape(*shape, 5),
        )
        decision = Interleave(top_k).decide(positions)
        assert decision.blend is None
        assert decision.by_teacher.shape == decision.threshold.shape == shape
        assert decision.by_teacher.flatten().tolist() == [not is_among_best(at, teacher, top_k) for at in range(5)]
        assert decision.threshold.isnan().all()


# ------ the trust-region blend

# The interval that is left of the exponent; the law's logarithm moves with the exponent by at most the spread of log p_T / p_S.
EXPONENT = 2.0**-20


def rounding_of_kl(logps: Sequence[Tensor]) -> float:
    """A few roundings of numbers as large as the largest logarithm, of which a KL is the difference."""
    largest = max(1.0, *(float(logp[logp.isfinite()].abs().max()) for logp in logps))
    return 8 * torch.finfo(logps[0].dtype).eps * largest


def spread_of(student: Sequence[float], teacher: Sequence[float]) -> float:
    """How far the logarithms of p_T / p_S are apart, over the ids that both allow; 0 where there are none."""
    ratios = [math.log(t / s) for s, t in zip(student, teacher, strict=True) if s > 0 and t > 0]
    return max(ratios, default=0.0) - min(ratios, default=0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.3, 1.0])
def test_the_trust_region_blend_is_the_law_of_its_definition(budget: float, shape: tuple[int, ...]) -> None:
    found = law_in(TrustRegionBlend(budget), MODELS, shape, torch.float64)
    for (student, teacher), law in zip(MODELS, found.tolist(), strict=True):
        expected = trust_region(student, teacher, budget)
        assert law == pytest.approx(expected, rel=EXPONENT * spread_of(student, teacher), abs=1e-14)


@st.composite
def two_models(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over a few ids, in float64; either may exclude some."""
    size = draw(st.integers(2, 7))
    logps = []
    for _ in range(2):
        logits = draw(st.lists(st.floats(-6, 6), min_size=size, max_size=size))
        excluded = draw(st.sets(st.integers(0, size - 1), max_size=size - 1) | st.just(set()))
        masked = [-math.inf if at in excluded else logit for at, logit in enumerate(logits)]
        logps.append(torch.log_softmax(torch.tensor(masked, dtype=torch.float64), dim=-1))
    return logps[0], logps[1]


BUDGETS = st.sampled_from([0.0, 1e-3, 0.1]) | st.floats(0, 4)


@given(models=two_models(), budget=BUDGETS, dtype=st.sampled_from(list(ROUNDING)))
def test_the_trust_region_blend_of_any_two_models(
    models: tuple[Tensor, Tensor], budget: float, dtype: torch.dtype
) -> None:
    student_logp, teacher_logp = (logp.to(dtype) for logp in models)
    law_logp = trust_region_blend(student_logp, teacher_logp, budget)
    assert law_logp.dtype == dtype
    student, teacher, law = (logp.double().exp().tolist() for logp in (student_logp, teacher_logp, law_logp))
    rounding = rounding_of_kl((student_logp, teacher_logp))
    assert math.fsum(law) == pytest.approx(1, abs=rounding)
    spent = relative_entropy(law, student)
    assert spent <= budget + rounding
    # By how much a law may move whose KL from the student is known to a rounding: between two blends of one family, the KL of
    # the farther from the nearer is at most the difference of their KLs from the student (the Pythagorean inequality of
    # projections onto a half-space), and half the sum of absolute differences at most sqrt(KL / 2) (Pinsker).
    moved = EXPONENT * spread_of(student, teacher) + math.sqrt(rounding / 2) + rounding
    if relative_entropy(teacher, student) <= budget - rounding:
        # exponent 1, and no search
        assert law == pytest.approx(teacher, abs=rounding)
    if budget == 0:
        assert law == pytest.approx(student, abs=moved)
    common = [s > 0 and t > 0 for s, t in zip(student, teacher, strict=True)]
    if not any(common):
        assert torch.equal(law_logp, student_logp)
        return
    # Ids that only the student allows are lost at once: the law jumps where the budget just pays for that.
    entry = relative_entropy(blended(student, teacher, 0.0), student)
    assume(entry < rounding or abs(entry - budget) > rounding + 1e-6)
    assert law == pytest.approx(trust_region(student, teacher, budget), abs=moved)


def test_a_trust_region_that_cannot_pay_for_what_the_teacher_excludes_is_the_student() -> None:
    """Half of the student's mass is excluded, which costs ln 2 before the blend has begun."""
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.0, 0.3, 0.7]).log()
    assert torch.equal(trust_region_blend(student, teacher, 0.69), student)
    assert trust_region_blend(student, teacher, 0.70)[0] == -math.inf


def test_without_a_budget_the_law_is_the_student_to_the_last_bit() -> None:
    """In float32 too, where the rounding of the divergence would let small exponents pass."""
    student, teacher = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(3)).log_softmax(dim=-1)
    assert torch.equal(trust_region_blend(student, teacher, 0.0), student)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_budget_falls_linearly_and_then_the_student_writes_alone(steps: int) -> None:
    policy = TrustRegionBlend(budget=0.3, anneal_steps=steps)
    for step in range(2 * steps + 2):
        in_force = policy.at_step(step)
        if step >= steps:
            assert in_force == Student()
            continue
        assert isinstance(in_force, TrustRegionBlend)
        assert in_force.budget == pytest.approx(0.3 * (steps - step) / steps, rel=1e-15)
        # What is in force at a step is constant: no later question anneals it a second time.
        assert in_force.at_step(step + 3) == in_force


def test_only_an_annealed_budget_depends_on_the_step() -> None:
    for policy in (TrustRegionBlend(0.3), Mix(), Switch(), Student()):
        assert policy.at_step(7) is policy


# ------------------------------------------------------------------------------------------------------------- adaswitch


def with_past(blocks: list[list[float]], pasts: list[list[float]], by_teacher: list[list[bool]]) -> Positions:
    """Blocks of equal length, each after its row's own past, padded on the left as the engines do."""
    width = max(map(len, pasts))
    padded = [[math.nan] * (width - len(past)) + past for past in pasts]
    writers = [[False] * (width - len(past)) + past for past in by_teacher]
    return seen(
        torch.tensor([[len(past) + at for at in range(len(blocks[0]))] for past in pasts]),
        divergence=torch.tensor(blocks, dtype=torch.float64),
        past_divergence=torch.tensor(padded, dtype=torch.float64).reshape(len(pasts), width),
        past_by_teacher=torch.tensor(writers, dtype=torch.bool).reshape(len(pasts), width),
    )


@given(
    rows=st.lists(st.lists(st.floats(0, math.log(2)), min_size=12, max_size=12), min_size=1, max_size=4),
    factor=st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]),
    window=st.integers(1, 14),
    data=st.data(),
)
def test_adaswitch_switches_once_where_the_divergence_jumps(
    rows: list[list[float]], factor: float, window: int, data: st.DataObject
) -> None:
    """However a row is cut into its past and a block, and whatever the lengths of the other rows' pasts."""
    policy, size = AdaSwitch(factor, window), data.draw(st.integers(1, 6))
    expected = [adaswitch(row, factor, window) for row in rows]
    starts = [data.draw(st.integers(0, 12 - size)) for _ in rows]
    pasts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    wrote = [writers[:start] for (writers, _), start in zip(expected, starts, strict=True)]
    blocks = [row[start : start + size] for row, start in zip(rows, starts, strict=True)]
    positions = with_past(blocks, pasts, wrote)
    decision = policy.decide(positions)
    for row, (writers, thresholds) in enumerate(expected):
        block = slice(starts[row], starts[row] + size)
        # Sums of up to 14 in another order, and factor / window for one division each: a few roundings of float64.
        assert decision.threshold[row].tolist() == pytest.approx(thresholds[block], rel=1e-14, nan_ok=True)
        near = [abs(d - t) < 1e-14 for d, t in zip(rows[row], thresholds, strict=True)]
        if not any(near):
            assert decision.by_teacher[row].tolist() == writers[block]
    if size == 1:
        one = policy.decide(
            dataclasses.replace(positions, position=positions.position[:, 0], divergence=positions.divergence[:, 0])
        )
        assert one.by_teacher.shape == one.threshold.shape == (len(rows),)
        assert torch.equal(one.by_teacher, decision.by_teacher[:, 0])


def test_adaswitch_by_hand() -> None:
    """0.5 > 2 * mean(0.1, 0.3) is a jump, 0.4 is none; what comes after is the teacher's, however near the models are."""
    jump, none = [0.1, 0.3, 0.5, 0.0], [0.1, 0.3, 0.4, 0.0]
    decision = AdaSwitch(factor=2.0, window=2).decide(with_past([jump, none], [[], []], [[], []]))
    assert decision.by_teacher.tolist() == [[False, False, True, True], [False] * 4]
    expected = [[math.nan, math.nan, 0.4, math.nan], [math.nan, math.nan, 0.4, 0.7]]
    for thresholds, wanted in zip(decision.threshold.tolist(), expected, strict=True):
        assert thresholds == pytest.approx(wanted, nan_ok=True)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_by_its_name_and_refuses_what_it_does_not_take(name: str) -> None:
    assert POLICY.make(name) == POLICY.make({"name": name}) == POLICY.make(f"{{name: {name}}}") == POLICIES[name]()
    with pytest.raises(UserError, match=f"speed is 3, but policy '{name}' takes"):
        POLICY.make({"name": name, "speed": 3})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        *(
            (each, {"teacher_share": share}, f"teacher_share is {share}; .* from 0 to 1")
            for each in (Mix, Early, Late)
            for share in (-0.1, 1.5, math.nan)
        ),
        (Interleave, {"keep_top_k": 0}, "keep_top_k is 0; .* at least its 1 best"),
        (TrustRegionBlend, {"budget": -1.0}, r"budget is -1\.0; .* 0 \(the student alone\) or more"),
        (TrustRegionBlend, {"budget": math.nan}, "budget is nan"),
        (TrustRegionBlend, {"budget": math.inf}, "budget is inf"),
        (TrustRegionBlend, {"anneal_steps": -1}, "anneal_steps is -1; .* 0 for a constant budget"),
        (AdaSwitch, {"factor": -1.0}, r"factor is -1\.0; .* 0 or more"),
        (AdaSwitch, {"factor": math.nan}, "factor is nan"),
        (AdaSwitch, {"factor": math.inf}, "factor is inf"),
        (AdaSwitch, {"window": 0}, "window is 0; .* at least 1 divergence"),
    ],
)
def test_policies_refuse_settings_out_of_range(
    make: Callable[..., Policy], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, r"threshold is -0\.1.*0\.693"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"decay_rate": -1.0}, r"decay_rate is -1\.0.*0 or more"),
        ({"decay_rate": math.inf}, "decay_rate is inf"),
        ({"decay_rate": math.nan}, "decay_rate is nan"),
        ({"final_fraction": 0.0}, r"final_fraction is 0\.0.*above 0 and at most 1"),
        ({"final_fraction": 1.5}, r"final_fraction is 1\.5"),
        ({"final_fraction": math.nan}, "final_fraction is nan"),
        ({"decay_rate": 0.01, "final_fraction": 0.1}, "two ways to say the same thing; give one"),
        ({"decay": "exp"}, "no decay named 'exp'; choose one of exponential, linear, constant"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Switch(**settings)
