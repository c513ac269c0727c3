"""Who writes: thresholds against their formulas, decisions element by element, and refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference.policies import adaswitch, is_among_best
from switchkd.errors import UserError
from switchkd.rollout.blends import Interleave, Mix
from switchkd.rollout.law import Decision, Policy, Positions
from switchkd.rollout.policies import DECAYS, POLICIES, POLICY, AdaSwitch, Early, Late, Student, Switch, Teacher

FORMULAS = {
    "exponential": lambda first, rate, t: first * math.exp(-rate * t),
    "linear": lambda first, rate, t: first * max(0.0, 1 - rate * t),
    "constant": lambda first, rate, t: first,
}


def decide(policy: Policy, position: Tensor, divergence: Tensor, max_new_tokens: int = 256) -> Decision:
    return policy.decide(seen(position, divergence=divergence, max_new_tokens=max_new_tokens))


def seen(position: Tensor, max_new_tokens: int = 256, **given: Tensor) -> Positions:
    """Positions of which a test gives what its policy looks at."""
    logp = torch.log_softmax(torch.zeros(*position.shape, 3), dim=-1)
    anything = {"student_logp": logp, "teacher_logp": logp, "proposal": torch.zeros_like(position)}
    numbers = dict.fromkeys(("divergence", "coin"), torch.full(position.shape, 0.5))
    return Positions(position, max_new_tokens=max_new_tokens, **{**anything, **numbers, **given})


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


# ------------------------------------------------------------------------------------- shares, at random and by position


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_mix_gives_the_teacher_the_positions_whose_coin_is_below_the_share(
    shape: tuple[int, ...], share: float
) -> None:
    coin = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    decision = Mix(share).decide(seen(torch.zeros(shape, dtype=torch.long), coin=coin))
    assert decision.by_teacher.flatten().tolist() == [each < share for each in coin.flatten().tolist()]
    assert decision.by_teacher.shape == decision.threshold.shape == shape
    assert decision.threshold.isnan().all()


@given(share=st.floats(0, 1), max_new_tokens=st.integers(1, 300))
def test_early_and_late_give_the_teacher_the_two_ends(share: float, max_new_tokens: int) -> None:
    count = round(share * max_new_tokens)
    position = torch.arange(max_new_tokens)
    early, late = (each(share).decide(seen(position, max_new_tokens)) for each in (Early, Late))
    assert early.by_teacher.tolist() == [True] * count + [False] * (max_new_tokens - count)
    assert late.by_teacher.tolist() == [False] * (max_new_tokens - count) + [True] * count
    assert early.threshold.isnan().all()
    assert late.threshold.isnan().all()


# ------------------------------------------------------------------------------------------------------------ interleave

# Ties at the edges of the top 2 and of the top 3, ids that the teacher excludes, and fewer possible ids than top_k.
TEACHERS = {
    "plain": [0.1, 0.4, 0.05, 0.3, 0.15],
    "ties": [0.2, 0.3, 0.2, 0.2, 0.1],
    "excludes": [0.5, 0.0, 0.5, 0.0, 0.0],
}


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)
def test_interleave_keeps_a_proposal_among_the_teachers_best(teacher: list[float], top_k: int) -> None:
    proposal = torch.arange(5)
    teacher_logp = torch.tensor(teacher).log().expand(5, 5)
    for shape in ((5,), (5, 1), (1, 5)):
        positions = seen(
            torch.zeros(shape, dtype=torch.long),
            proposal=proposal.reshape(shape),
            teacher_logp=teacher_logp.reshape(*shape, 5),
        )
        decision = Interleave(top_k).decide(positions)
        assert decision.by_teacher.shape == decision.threshold.shape == shape
        assert decision.by_teacher.flatten().tolist() == [not is_among_best(at, teacher, top_k) for at in range(5)]
        assert decision.threshold.isnan().all()


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
