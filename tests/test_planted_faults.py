"""The checks catch the faults that were seen elsewhere, and let the right implementation pass."""

from __future__ import annotations

import pytest

from checks import divergence, objective
from checks.divergence import Reference
from checks.targets import Loss, check_constant, check_target
from checks.weights import check_weight
from faults import divergences, objectives, targets, weights


@pytest.mark.parametrize("fault", divergences.FAULTS, ids=lambda fault: fault.function.__name__)
def test_a_wrong_divergence_is_caught(fault: divergences.Fault) -> None:
    reference = Reference.named(fault.claims, **fault.settings)
    for check in fault.caught_by:
        with pytest.raises(AssertionError):
            divergence.CHECKS[check](fault.function, reference)


@pytest.mark.parametrize("loss", objectives.FAULTS, ids=lambda loss: loss.__name__)
def test_a_wrong_loss_is_caught(loss: objective.Loss) -> None:
    for check in objectives.FAULTS[loss]:
        # A view of chunks that do not fit is a crash; everything else is a wrong number.
        with pytest.raises((AssertionError, RuntimeError)):
            objective.CHECKS[check](loss)


@pytest.mark.parametrize("check", objective.CHECKS)
def test_the_loss_that_the_faults_are_variants_of_passes(check: str) -> None:
    objective.CHECKS[check](objectives.right)


@pytest.mark.parametrize("loss", objectives.POSITION_FAULTS, ids=lambda loss: loss.__name__)
def test_wrongly_counted_positions_are_caught(loss) -> None:
    with pytest.raises(AssertionError):
        objective.check_counted_positions(loss)


def test_rightly_counted_positions_pass() -> None:
    objective.check_counted_positions(objectives.counted_as_they_should_be)


def test_every_check_catches_something() -> None:
    caught = {check for fault in divergences.FAULTS for check in fault.caught_by}
    assert caught | {"positive_otherwise"} == set(divergence.CHECKS)
    assert {check for checks in objectives.FAULTS.values() for check in checks} == set(objective.CHECKS)


@pytest.mark.parametrize("fault", weights.FAULTS, ids=lambda fault: fault.function.__name__)
def test_a_wrong_weight_is_caught(fault: weights.Fault) -> None:
    with pytest.raises(AssertionError):
        check_weight(fault.function, fault.claims)


@pytest.mark.parametrize("fault", targets.FAULTS, ids=lambda fault: fault.function.__name__)
def test_a_wrong_target_is_caught(fault: targets.Fault) -> None:
    with pytest.raises(AssertionError):
        check_target(fault.function, fault.claims)


@pytest.mark.parametrize("loss", targets.LOSS_FAULTS, ids=lambda loss: loss.__name__)
def test_a_gradient_through_the_target_is_caught(loss: Loss) -> None:
    with pytest.raises(AssertionError):
        check_constant(loss, targets.constant_target)


def test_the_loss_of_a_constant_target_passes() -> None:
    check_constant(targets.constant_target, targets.constant_target)
