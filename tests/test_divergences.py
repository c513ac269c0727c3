"""Every row of the divergence table against the definitions of `reference.divergences` and the conformance checks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from checks.divergence import CHECKS, Reference, logp, random_logits
from reference.divergences import VALUES
from switchkd.divergences import DIVERGENCES, divergence_named, jensen_shannon
from switchkd.errors import UserError

WEIGHTS = (0.1, 0.9)

# Every row, at its defaults and with each setting away from them on either side.
VARIANTS = [
    pytest.param(name, dict(zip(row.settings, values, strict=True)), id="-".join([name, *map(str, values)]))
    for name, row in DIVERGENCES.items()
    for values in itertools.product(*((default, *WEIGHTS) for default in row.settings.values()))
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
    value = jensen_shannon(student, teacher, teacher_weight=teacher_weight)
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
    values = jensen_shannon(student, teacher, teacher_weight=teacher_weight)
    assert values.max() <= bound + 1e-12
    disjoint = torch.eye(2, dtype=torch.float64).log()
    reached = jensen_shannon(disjoint[0], disjoint[1], teacher_weight=teacher_weight)
    assert float(reached) == pytest.approx(bound, rel=1e-12)


def test_the_bound_at_equal_weights_is_ln_2() -> None:
    disjoint = torch.eye(2).log()
    assert float(jensen_shannon(disjoint[0], disjoint[1])) <= math.log(2) + 1e-7  # one float32 rounding


def test_jensen_shannon_at_equal_weights_is_symmetric() -> None:
    student, teacher = map(logp, random_logits((20, 9)))
    torch.testing.assert_close(
        jensen_shannon(student, teacher), jensen_shannon(teacher, student), rtol=1e-12, atol=1e-14
    )


def test_jensen_shannon_is_continuous_in_its_weight_down_to_0_at_both_ends() -> None:
    """A weight of 0.0001 is near weight 0, which is 0; it does not jump to a KL divergence."""
    student, teacher = map(logp, random_logits((20, 9)))
    for near_an_end in (1e-4, 1 - 1e-4):
        value = jensen_shannon(student, teacher, teacher_weight=near_an_end)
        # w (1 - w) times a divergence of the order of the two KLs, which are below 20 nats here.
        assert (value < 20 * 1e-4).all()


@pytest.mark.parametrize("end", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_the_ends_of_the_weight_are_refused(end: float) -> None:
    student, teacher = map(logp, random_logits((2, 3)))
    with pytest.raises(UserError, match=r"teacher_weight is .*strictly between 0 and 1"):
        jensen_shannon(student, teacher, teacher_weight=end)
    with pytest.raises(UserError, match="teacher_weight"):
        divergence_named("jensen_shannon", teacher_weight=end)


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", ["", "kl", "forward", "forward_kl ", "FORWARD_KL", "skewed_forward_kl_x", "jsd"])
def test_a_name_has_to_be_exact_and_the_refusal_lists_the_choices(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        divergence_named(name)
    assert repr(name) in str(refusal.value)
    for choice in DIVERGENCES:
        assert choice in str(refusal.value)


@pytest.mark.parametrize("name", [name for name, row in DIVERGENCES.items() if not row.settings])
def test_a_setting_that_a_divergence_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"teacher_weight is 0\.3"):
        divergence_named(name, teacher_weight=0.3)
    divergence_named(name, teacher_weight=None)


def test_a_setting_of_none_keeps_the_default() -> None:
    student, teacher = map(logp, random_logits((4, 6)))
    default = divergence_named("jensen_shannon", teacher_weight=None)(student, teacher)
    assert torch.equal(default, jensen_shannon(student, teacher))
