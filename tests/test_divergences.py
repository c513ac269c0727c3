"""Every row of the divergence table against the definitions of `reference.divergences` and the conformance checks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from checks.divergence import CHECKS, Reference, divergence_named, logp, random_logits
from reference.divergences import VALUES
from switchkd.distributions.divergences import DIVERGENCE, DIVERGENCES, JensenShannon, _is_head
from switchkd.errors import UserError
from switchkd.settings.components import settings_of

DEFAULTS = {name: {key: each.default for key, each in settings_of(row).items()} for name, row in DIVERGENCES.items()}


def other_values(setting: str) -> tuple[float, float]:
    """Away from the default on either side; powers may exceed 1."""
    return (0.5, 1.5) if setting.endswith("_power") else (0.1, 0.9)


# Every row, at its defaults and with each setting away from them on either side.
VARIANTS = [
    pytest.param(name, dict(zip(defaults, values, strict=True)), id="-".join([name, *map(str, values)]))
    for name, defaults in DEFAULTS.items()
    for values in itertools.product(*({default, *other_values(key)} for key, default in defaults.items()))
]


def test_every_divergence_has_a_reference() -> None:
    assert set(VALUES) == set(DIVERGENCES)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_conformance(name: str, settings: dict[str, float], check: str) -> None:
    CHECKS[check](divergence_named(name, **settings), Reference.named(name, **settings))


LOGITS = arrays.arrays("float64", st.tuples(st.just(2), st.integers(1, 9)), elements=st.floats(-50, 50))


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@given(logits=LOGITS)
def test_any_pair_of_distributions_agrees_with_the_definition(name: str, settings: dict[str, float], logits) -> None:
    student, teacher = logp(torch.tensor(logits)).unbind()
    value = divergence_named(name, **settings)(student, teacher)
    assert value >= 0
    expected = Reference.named(name, **settings).values(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)  # float64, log-probabilities of up to 100 nats


# ------------------------------------------------------------------------------------------------------- one-sided -inf


def test_a_divergence_is_infinite_where_the_definition_is() -> None:
    both, first = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert divergence_named("forward_kl")(student_logp=first, teacher_logp=both) == torch.inf
    assert divergence_named("reverse_kl")(student_logp=both, teacher_logp=first) == torch.inf
    torch.testing.assert_close(divergence_named("forward_kl")(both, first), torch.tensor(math.log(2)))
    torch.testing.assert_close(divergence_named("reverse_kl")(first, both), torch.tensor(math.log(2)))


@pytest.mark.parametrize("teacher_weight", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_finite_where_only_one_excludes(teacher_weight: float) -> None:
    """As under top-k sampling, where the two keep different tokens."""
    student_logits, teacher_logits = random_logits((6, 12))
    student_kept, teacher_kept = (
        torch.rand(6, 12, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in (0, 1)
    )
    student_kept[:, 0] = teacher_kept[:, 1] = True
    assert (student_kept & ~teacher_kept).any()
    student = logp(student_logits.masked_fill(~student_kept, -torch.inf))
    teacher = logp(teacher_logits.masked_fill(~teacher_kept, -torch.inf))
    value = JensenShannon(teacher_weight)(student, teacher)
    expected = Reference.named("jensen_shannon", teacher_weight=teacher_weight).values(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)  # float64, 12 terms
    value.sum().backward()
    assert student_logits.grad.isfinite().all()
    assert teacher_logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------- Jensen-Shannon


@pytest.mark.parametrize("teacher_weight", [0.01, 0.1, 0.5, 0.9])
def test_jensen_shannon_is_bounded_by_the_entropy_of_its_weight_and_reaches_it(teacher_weight: float) -> None:
    bound = -sum(w * math.log(w) for w in (teacher_weight, 1 - teacher_weight))
    student, teacher = map(logp, random_logits((500, 7), scale=40))
    values = JensenShannon(teacher_weight)(student, teacher)
    assert values.max() <= bound + 1e-12
    disjoint = torch.eye(2, dtype=torch.float64).log()
    reached = JensenShannon(teacher_weight)(disjoint[0], disjoint[1])
    assert float(reached) == pytest.approx(bound, rel=1e-12)


def test_the_bound_at_equal_weights_is_ln_2() -> None:
    disjoint = torch.eye(2).log()
    assert float(JensenShannon()(disjoint[0], disjoint[1])) <= math.log(2) + 1e-7  # one float32 rounding


def test_jensen_shannon_at_equal_weights_is_symmetric() -> None:
    student, teacher = map(logp, random_logits((20, 9)))
    torch.testing.assert_close(
        JensenShannon()(student, teacher), JensenShannon()(teacher, student), rtol=1e-12, atol=1e-14
    )


def test_jensen_shannon_is_continuous_in_its_weight_down_to_0_at_both_ends() -> None:
    """A weight of 0.0001 is near weight 0, which is 0; it does not jump to a KL divergence."""
    student, teacher = map(logp, random_logits((20, 9)))
    for near_an_end in (1e-4, 1 - 1e-4):
        value = JensenShannon(near_an_end)(student, teacher)
        # w (1 - w) times a divergence of the order of the two KLs, which are below 20 nats here.
        assert (value < 20 * 1e-4).all()


# --------------------------------------------------------------------------------------------- limits and known values


def two_distributions() -> tuple[Tensor, Tensor]:
    student, teacher = map(logp, random_logits((20, 9)))
    return student.detach(), teacher.detach()


@pytest.mark.parametrize(
    ("name", "near", "limit"),
    [
        ("skewed_forward_kl", {"teacher_weight": 1e-7}, "forward_kl"),
        ("skewed_reverse_kl", {"student_weight": 1e-7}, "reverse_kl"),
        ("symmetric_kl", {"forward_weight": 1 - 1e-7}, "forward_kl"),
        ("symmetric_kl", {"forward_weight": 1e-7}, "reverse_kl"),
        ("alpha_beta", {"teacher_power": 1.0, "student_power": 1e-7}, "forward_kl"),
        ("alpha_beta", {"teacher_power": 1e-7, "student_power": 1.0}, "reverse_kl"),
        ("adaptive_kl", {"head_mass": 1 - 1e-7}, "forward_kl"),
    ],
)
def test_near_the_end_of_a_setting_is_near_the_divergence_of_another_name(
    name: str, near: dict[str, float], limit: str
) -> None:
    value = divergence_named(name, **near)(*two_distributions())
    expected = divergence_named(limit)(*two_distributions())
    # 1e-7 times probability ratios of up to e^8 = 3000, relative; expm1(x) / 1e-7 loses 7 of float64's 16 digits.
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_the_alpha_beta_divergence_at_powers_of_1_is_half_the_squared_distance() -> None:
    student, teacher = two_distributions()
    value = divergence_named("alpha_beta", teacher_power=1.0, student_power=1.0)(student, teacher)
    expected = (student.exp() - teacher.exp()).square().sum(dim=-1) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)  # float64, 9 terms


def test_known_pairs_mirror_each_other() -> None:
    """Swapping the two models, and the setting's side with them, changes nothing."""
    student, teacher = two_distributions()
    for one, other in (
        (("skewed_forward_kl", {"teacher_weight": 0.3}), ("skewed_reverse_kl", {"student_weight": 0.3})),
        (("symmetric_kl", {"forward_weight": 0.3}), ("symmetric_kl", {"forward_weight": 0.7})),
        (("total_variation", {}), ("total_variation", {})),
        (
            ("alpha_beta", {"teacher_power": 0.3, "student_power": 1.2}),
            ("alpha_beta", {"teacher_power": 1.2, "student_power": 0.3}),
        ),
    ):
        value = divergence_named(one[0], **one[1])(student, teacher)
        mirrored = divergence_named(other[0], **other[1])(teacher, student)
        torch.testing.assert_close(value, mirrored, rtol=1e-12, atol=1e-15)  # the order of two summands


@pytest.mark.parametrize("name", ["skewed_forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("weight", [0.01, 0.1, 0.9])
def test_a_skewed_kl_is_bounded_by_the_log_of_its_weight_and_reaches_it(name: str, weight: float) -> None:
    (setting,) = DEFAULTS[name]
    divergence = divergence_named(name, **{setting: weight})
    disjoint = torch.eye(2, dtype=torch.float64).log()
    assert float(divergence(disjoint[0], disjoint[1])) == pytest.approx(-math.log(weight), rel=1e-12)
    assert (divergence(*map(logp, random_logits((500, 7), scale=40))) <= -math.log(weight) + 1e-12).all()


def test_total_variation_at_ties_has_a_finite_gradient_from_the_other_ids_alone() -> None:
    student_logp = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    value = divergence_named("total_variation")(student_logp, torch.tensor([0.5, 0.2, 0.3]).log())
    assert value.item() == pytest.approx(0.1, rel=1e-6)  # a few float32 roundings
    value.backward()
    torch.testing.assert_close(student_logp.grad, torch.tensor([0.0, 0.15, -0.1]))


def test_the_head_of_adaptive_kl_is_the_smallest_set_of_that_mass_with_all_equals() -> None:
    def head(probabilities: list[float], head_mass: float) -> list[int]:
        return _is_head(torch.tensor(probabilities).log(), head_mass).nonzero()[:, 0].tolist()

    assert head([0.1, 0.6, 0.3], 0.5) == [1]
    assert head([0.1, 0.6, 0.3], 0.6) == [1]
    assert head([0.1, 0.6, 0.3], 0.7) == [1, 2]
    assert head([0.4, 0.1, 0.5], 0.5) == [2]  # 0.5 of a float32 logarithm is 0.49999997
    assert head([0.2, 0.5, 0.1, 0.2], 0.6) == [0, 1, 3]
    assert head([0.25] * 4, 0.5) == [0, 1, 2, 3]
    assert head([0.5, 0.5, 0.0], 1 - 1e-9) == [0, 1]
    assert head([0.1, 0.6, 0.3], 1e-9) == [1]


def test_a_weight_of_0_switches_an_infinite_kl_off_in_adaptive_kl() -> None:
    """The models agree on the head; the student excludes an id of the tail: forward KL is infinite, and weighs nothing."""
    student_logp = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log().requires_grad_()
    teacher_logp = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    value = divergence_named("adaptive_kl")(student_logp, teacher_logp)
    torch.testing.assert_close(value, divergence_named("reverse_kl")(student_logp, teacher_logp), rtol=0, atol=0)
    value.backward()
    assert student_logp.grad.isfinite().all()


# --------------------------------------------------------------------------------------------- settings that are refused

SETTINGS = [(name, setting) for name, defaults in DEFAULTS.items() for setting in defaults]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_the_ends_of_a_setting_are_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{setting} is {value}; it has to be "):
        DIVERGENCES[name](**{setting: value})
    with pytest.raises(UserError, match=setting):
        divergence_named(name, **{setting: value})


@pytest.mark.parametrize(("name", "setting"), [row for row in SETTINGS if not row[1].endswith("_power")])
@pytest.mark.parametrize("value", [1.0, 1.5])
def test_a_share_is_below_1(name: str, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{setting} is {value}; it has to be strictly between 0 and 1"):
        divergence_named(name, **{setting: value})


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", ["", "kl", "forward", "forward_kl ", "FORWARD_KL", "skewed_forward_kl_x", "jsd"])
def test_a_name_has_to_be_exact_and_the_refusal_lists_the_choices(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        divergence_named(name)
    assert repr(name) in str(refusal.value)
    for choice in DIVERGENCES:
        assert choice in str(refusal.value)


@pytest.mark.parametrize("name", [name for name, defaults in DEFAULTS.items() if not defaults])
def test_a_setting_that_a_divergence_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"teacher_weight is 0\.3"):
        divergence_named(name, teacher_weight=0.3)


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_divergence_is_described_by_what_makes_it_again(name: str, setting: str) -> None:
    made = divergence_named(name, **{setting: 0.35})
    assert DIVERGENCE.describe(made) == {"name": name, **DEFAULTS[name], setting: 0.35}
    assert DIVERGENCE.make(DIVERGENCE.describe(made)) == made
    assert DIVERGENCE.make({setting: 0.35}, default=DIVERGENCES[name]()) == made
