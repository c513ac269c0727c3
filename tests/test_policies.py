"""Who writes: thresholds against their formulas, decisions element by element, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchkd.errors import UserError
from switchkd.policies import DECAYS, Decision, Policy, Positions, Student, Switch, Teacher

FORMULAS = {
    "exponential": lambda first, rate, t: first * math.exp(-rate * t),
    "linear": lambda first, rate, t: first * max(0.0, 1 - rate * t),
    "constant": lambda first, rate, t: first,
}


def decide(policy: Policy, position: Tensor, divergence: Tensor, max_new_tokens: int = 256) -> Decision:
    logp = torch.log_softmax(torch.zeros(*position.shape, 3), dim=-1)
    return policy.decide(
        Positions(position, divergence, logp, logp, torch.zeros_like(position), max_new_tokens=max_new_tokens)
    )


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


# ------------------------------------------------------------------------------------------------------------- refusals


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
