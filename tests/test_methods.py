"""The method table: what a run's settings replace, what is refused, and that two settings stay two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checks.divergence import logp, random_logits
from switchkd.config import SwitchConfig
from switchkd.divergences import divergence_named
from switchkd.errors import UserError
from switchkd.methods import METHODS, Plan, method_named, plan_of
from switchkd.policies import Student, Switch

DISTRIBUTIONS = tuple(map(logp, random_logits((5, 7))))


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    def make(**settings: Any) -> Plan:
        return plan_of(SwitchConfig(output_dir=str(tmp_path), **settings))

    return make


def loss_of(plan: Plan) -> torch.Tensor:
    assert plan.objective.divergence is not None
    return plan.objective.divergence(*DISTRIBUTIONS)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_gives_a_plan_and_carries_its_words(name: str, plan: Any) -> None:
    row, made = METHODS[name], plan(method=name)
    assert made.objective.cross_entropy_weight == row.cross_entropy_weight
    assert (made.objective.divergence is None) == (row.divergence is None)
    assert row.summary
    assert row.source
    assert row.departs


def test_switch_is_the_default_with_its_settings(plan: Any) -> None:
    assert plan().policy == Switch(threshold=0.3)
    made = plan(threshold=0.2, decay="linear", decay_rate=0.01)
    assert made.policy == Switch(threshold=0.2, decay="linear", decay_rate=0.01)
    assert plan(final_fraction=0.5).policy == Switch(final_fraction=0.5)
    assert torch.equal(loss_of(made), divergence_named("forward_kl")(*DISTRIBUTIONS))


def test_gkd_takes_its_share_and_its_weight(plan: Any) -> None:
    default = plan(method="gkd")
    assert default.policy == Student()
    assert default.rollout_share == 1
    assert not default.needs_response
    assert torch.equal(loss_of(default), divergence_named("jensen_shannon", teacher_weight=0.1)(*DISTRIBUTIONS))
    half = plan(method="gkd", student_share=0.5, teacher_weight=0.3)
    assert half.rollout_share == 0.5
    assert half.needs_response
    assert torch.equal(loss_of(half), divergence_named("jensen_shannon", teacher_weight=0.3)(*DISTRIBUTIONS))


def test_the_row_s_weight_does_not_follow_another_divergence(plan: Any) -> None:
    assert torch.equal(
        loss_of(plan(method="gkd", divergence="reverse_kl")), divergence_named("reverse_kl")(*DISTRIBUTIONS)
    )
    assert torch.equal(
        loss_of(plan(method="switch", divergence="jensen_shannon")), divergence_named("jensen_shannon")(*DISTRIBUTIONS)
    )


def test_sampling_and_loss_have_a_temperature_each(tmp_path: Path) -> None:
    """One temperature that sets both is a fault seen elsewhere."""
    cool = SwitchConfig(output_dir=str(tmp_path), temperature=0.5)
    assert (cool.sampling.temperature, plan_of(cool).objective.loss_temperature) == (0.5, 1)
    hot_loss = SwitchConfig(output_dir=str(tmp_path), loss_temperature=2.0)
    assert (hot_loss.sampling.temperature, plan_of(hot_loss).objective.loss_temperature) == (1, 2)


def test_sampling_is_what_the_configuration_says(tmp_path: Path) -> None:
    config = SwitchConfig(output_dir=str(tmp_path), max_new_tokens=7, temperature=0.0, top_p=0.9, top_k=5)
    sampling = config.sampling
    assert (sampling.max_new_tokens, sampling.greedy, sampling.top_p, sampling.top_k) == (7, True, 0.9, 5)


@pytest.mark.parametrize("name", ["", "Switch", "switch ", "gk", "sftt", "kd-forward"])
def test_a_name_has_to_be_exact_and_the_refusal_lists_the_choices(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        method_named(name)
    assert repr(name) in str(refusal.value)
    for choice in METHODS:
        assert choice in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gkd", "student_share": 1.5}, r"student_share is 1\.5"),
        ({"method": "gkd", "student_share": -0.1}, r"student_share is -0\.1"),
        ({"method": "kd", "student_share": 0.5}, "trains on data only"),
        ({"method": "sft", "teacher_weight": 0.5}, "has no divergence"),
        ({"method": "switch", "teacher_weight": 0.5}, "leave teacher_weight out"),
        ({"method": "gkd", "teacher_weight": 1.0}, r"teacher_weight is 1\.0"),
        ({"divergence": "kl"}, "no divergence named 'kl'"),
        ({"loss_temperature": 0.0}, r"loss_temperature is 0\.0"),
        ({"threshold": -1.0}, r"threshold is -1\.0"),
        ({"method": "sft", "cross_entropy_weight": 0.0}, "cross_entropy_weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_model_is_loaded(
    settings: dict[str, Any], message: str, plan: Any
) -> None:
    with pytest.raises(UserError, match=message):
        plan(**settings)
