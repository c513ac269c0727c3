"""A method is a row of a table; every field of it that a setting replaces is the one in force."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.distributions.divergences import DIVERGENCES, divergence_named
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import Plan, plan_of
from switchkd.methods.table import METHODS, ROW_SETTINGS, method_named
from switchkd.report.methods_page import methods_page
from switchkd.report.terminal import settings_of
from switchkd.rollout.policies import Early, Interleave, Late, Mix, Student, Switch


def plan(**settings: Any) -> Plan:
    return plan_of(SwitchConfig(output_dir="unused", **settings))


def divergence_in_force(settings: dict[str, Any]) -> torch.Tensor:
    """The plan's divergence between two fixed distributions."""
    function = plan(**settings).objective.divergence
    assert function is not None
    return function(STUDENT_LOGP, TEACHER_LOGP)


STUDENT_LOGP = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
TEACHER_LOGP = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
# KL(teacher || student) of these two.
FORWARD_KL = 0.1 * math.log(0.1 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.7 * math.log(0.7 / 0.2)


def test_what_each_method_is_without_settings() -> None:
    table = {
        name: (plan(method=name).rollout_share, plan(method=name).needs_response, type(plan(method=name).policy))
        for name in METHODS
    }
    assert {name: table[name] for name in ("sft", "kd", "gkd", "switch")} == {
        "sft": (0.0, True, Student),
        "kd": (0.0, True, Student),
        "gkd": (1.0, False, Student),
        "switch": (1.0, False, Switch),
    }
    assert plan(method="sft").objective.divergence is None
    assert plan(method="sft").objective.cross_entropy_weight == 1
    for name in ("kd", "switch"):
        assert float(divergence_in_force({"method": name})) == pytest.approx(FORWARD_KL, abs=1e-15)
        assert plan(method=name).objective.cross_entropy_weight == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_row_says_what_it_is_and_makes_a_plan(name: str) -> None:
    row = METHODS[name]
    assert row.summary
    assert row.source
    assert row.departs
    made = plan(method=name)
    assert (made.objective.divergence is not None) == (row.divergence is not None)
    assert made.needs_teacher == (name != "sft")
    assert made.objective.divergence is not None or made.objective.cross_entropy_weight > 0


def test_the_divergence_can_be_replaced_in_every_method() -> None:
    expected = divergence_named("reverse_kl")
    for name in METHODS:
        assert plan(method=name, divergence="reverse_kl").objective.divergence is expected


def test_the_rows_own_weight_stays_with_the_rows_own_divergence() -> None:
    own = divergence_in_force({"method": "gkd"})
    assert own == divergence_in_force({"method": "gkd", "teacher_weight": 0.1})
    assert own != divergence_in_force({"method": "gkd", "teacher_weight": 0.5})
    assert divergence_in_force({"method": "gkd", "divergence": "forward_kl"}) == divergence_in_force({"method": "kd"})
    # Where another method takes that divergence, the divergence's own default holds.
    even = divergence_in_force({"method": "gkd", "teacher_weight": 0.5})
    assert divergence_in_force({"method": "kd", "divergence": "jensen_shannon"}) == even
    assert divergence_in_force({"method": "kd", "divergence": "jensen_shannon", "teacher_weight": 0.1}) == own


@pytest.mark.parametrize(
    ("name", "setting"), [(name, key) for name, row in DIVERGENCES.items() for key in row.settings]
)
def test_every_setting_of_every_divergence_is_in_force(name: str, setting: str) -> None:
    given = {"method": "kd", "divergence": name, setting: 0.35}
    expected = divergence_named(name, **{setting: 0.35})
    assert divergence_in_force(given) == expected(STUDENT_LOGP, TEACHER_LOGP)
    # At the default of 0.5 the head of these two is the same as at 0.35.
    assert setting == "head_mass" or divergence_in_force(given) != divergence_in_force(
        {"method": "kd", "divergence": name}
    )


# What replaces each setting of a row or a policy, and where it arrives.
REPLACED: dict[str, tuple[dict[str, Any], Callable[[Plan], Any]]] = {
    "keep_top_k": ({"method": "skd", "keep_top_k": 3}, lambda made: made.policy.keep_top_k),
    "factor": ({"method": "adaswitch", "factor": 3.5}, lambda made: made.policy.factor),
    "window": ({"method": "adaswitch", "window": 5}, lambda made: made.policy.window),
    "teacher_share": ({"method": "minillm", "teacher_share": 0.4}, lambda made: made.policy.teacher_share),
    "long_term_weight": ({"method": "minillm", "long_term_weight": 0.5}, lambda made: made.objective.long_term_weight),
    "teacher_text_share": ({"method": "gkd", "teacher_text_share": 0.25}, lambda made: made.teacher_text_share),
    "share_rise": ({"method": "distillm", "share_rise": 0.2}, lambda made: made.share_rise),
    "replay_capacity": ({"method": "switch", "replay_capacity": 7}, lambda made: made.replay_capacity),
    "replay_share": ({"method": "distillm", "replay_share": 0.75}, lambda made: made.replay_share),
    "teacher_text": ({"method": "seqkd", "teacher_text": "there.jsonl"}, lambda made: str(made.teacher_text)),
}


@pytest.mark.parametrize("setting", REPLACED)
def test_a_setting_of_a_row_is_replaced_by_the_runs(setting: str) -> None:
    given, arrives = REPLACED[setting]
    assert arrives(plan(**given)) == given[setting]


def test_rows_bring_their_own_settings() -> None:
    assert plan(method="minillm").policy == Mix(0.2)
    assert plan(method="random").policy == Mix(0.53)
    assert plan(method="early").policy == Early(0.53)
    assert plan(method="late").policy == Late(0.53)
    assert plan(method="skd").policy == Interleave(25)
    assert plan(method="distillm").replay_capacity == 1000
    assert plan(method="seqkd").teacher_text == Path("unused/teacher_text.jsonl")
    assert not plan(method="seqkd").needs_response


def test_the_teachers_text_has_a_divergence_of_its_own() -> None:
    objective = plan(method="distillm2", teacher_weight=0.2, student_weight=0.3).objective
    assert objective.divergence is not None
    student, teacher = STUDENT_LOGP.expand(2, 3), TEACHER_LOGP.expand(2, 3)
    by_student, by_teacher = objective.divergence_by_writer(student, teacher, torch.tensor([False, True]))
    assert by_student == divergence_named("skewed_reverse_kl", student_weight=0.3)(STUDENT_LOGP, TEACHER_LOGP)
    assert by_teacher == divergence_named("skewed_forward_kl", teacher_weight=0.2)(STUDENT_LOGP, TEACHER_LOGP)
    mixed = plan(method="switch", teacher_text_divergence="reverse_kl").objective
    by_student, by_teacher = mixed.divergence_by_writer(student, teacher, torch.tensor([False, True]))
    assert by_student == divergence_named("forward_kl")(STUDENT_LOGP, TEACHER_LOGP)
    assert by_teacher == divergence_named("reverse_kl")(STUDENT_LOGP, TEACHER_LOGP)


def test_settings_of_the_loss_are_in_force() -> None:
    objective = plan(method="switch", cross_entropy_weight=0.25, loss_temperature=2.0).objective
    assert (objective.cross_entropy_weight, objective.loss_temperature) == (0.25, 2.0)
    assert plan(method="kd", cross_entropy_weight=0.0).objective.cross_entropy_weight == 0


def test_the_student_share_is_in_force() -> None:
    made = plan(method="gkd", student_share=0.5)
    assert made.rollout_share == 0.5
    assert made.needs_response
    assert not plan(method="gkd", student_share=1.0).needs_response
    assert plan(method="gkd", student_share=0.0).rollout_share == 0


def test_settings_of_the_policy_are_in_force() -> None:
    assert plan(method="switch", threshold=0.2, decay="linear", decay_rate=0.01).policy == Switch(
        0.2, decay_rate=0.01, decay="linear"
    )
    assert plan(method="switch", final_fraction=0.5).policy == Switch(0.3, final_fraction=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "swich"}, "no method named 'swich'; choose one of sft, kd, gkd, switch"),
        ({"method": "Switch"}, "no method named 'Switch'"),
        ({"divergence": "kl"}, "no divergence named 'kl'; choose one of forward_kl"),
        ({"method": "kd", "student_share": 0.5}, "student_share is 0.5, but method 'kd' trains on data only"),
        ({"method": "sft", "student_share": 0.0}, "student_share is 0.0, but method 'sft'"),
        ({"method": "gkd", "student_share": 1.5}, "student_share is 1.5; .* from 0 to 1"),
        ({"method": "gkd", "student_share": -0.1}, "student_share is -0.1"),
        (
            {"method": "kd", "teacher_weight": 0.5},
            "teacher_weight is 0.5, but divergence 'forward_kl' takes no settings",
        ),
        ({"method": "sft", "teacher_weight": 0.5}, "teacher_weight is 0.5, but method 'sft' has no divergence"),
        (
            {"method": "gkd", "student_weight": 0.5},
            "student_weight is 0.5, but divergence 'jensen_shannon' takes teacher_weight; leave student_weight out",
        ),
        ({"method": "sft", "head_mass": 0.5}, "head_mass is 0.5, but method 'sft' has no divergence"),
        ({"divergence": "alpha_beta", "teacher_power": 0.0}, "teacher_power is 0.0; it has to be positive"),
        ({"method": "gkd", "teacher_weight": 0.0}, "teacher_weight is 0.0; it has to be strictly between 0 and 1"),
        ({"method": "gkd", "teacher_weight": 1.0}, "teacher_weight is 1.0"),
        ({"method": "skd", "keep_top_k": 0}, "keep_top_k is 0; .* at least its 1 best"),
        ({"method": "kd", "train_on": "student"}, "train_on is 'student'.* act on rollouts, but method 'kd' has none"),
        ({"method": "seqkd", "train_on": "teacher"}, "act on rollouts, but method 'seqkd' has none here"),
        ({"method": "gkd", "train_on": "teacher"}, "train_on is 'teacher'.* written by student, .*set train_on to all"),
        ({"method": "gkd", "student_share": 0.5, "train_on": "teacher"}, "written by student, "),
        ({"method": "late", "teacher_share": 0.0, "train_on": "teacher"}, "written by student, "),
        ({"method": "late", "teacher_share": 1.0, "train_on": "student"}, "written by teacher, "),
        ({"method": "distillm2", "teacher_text_share": 1.0, "train_on": "student"}, "written by teacher, "),
        ({"student_token_weight": 0.0, "teacher_token_weight": 0.0}, "written by student and teacher"),
        ({"method": "gkd", "keep_top_k": 3}, "keep_top_k is 3, but method 'gkd' does not read it"),
        ({"method": "switch", "teacher_share": 0.3}, "teacher_share is 0.3, but method 'switch' does not read it"),
        ({"method": "kd", "factor": 2.0}, "factor is 2.0, but method 'kd' does not read it"),
        ({"method": "switch", "teacher_text": "x"}, "teacher_text is 'x', but method 'switch' does not read it"),
        ({"method": "kd", "replay_capacity": 5}, "replay_capacity is 5, but method 'kd' has no rollouts"),
        ({"method": "switch", "replay_share": 0.5}, "replay_share is 0.5, but replay_capacity is 0"),
        ({"method": "distillm", "share_rise": -0.1}, "share_rise is -0.1"),
        ({"method": "distillm", "replay_capacity": -1}, "replay_capacity is -1"),
        ({"method": "sft", "teacher_text_divergence": "reverse_kl"}, "method 'sft' has no divergence"),
        ({"method": "minillm", "temperature": 0.5}, "long_term_weight is 1.0, which needs text drawn"),
        (
            {"method": "minillm", "replay_capacity": 5},
            "long_term_weight is 1.0, which needs text of the student as it is",
        ),
        ({"method": "skd", "long_term_weight": 1.0}, "the probability of what Interleave writes is not known"),
        ({"method": "random", "teacher_share": 1.5}, "teacher_share is 1.5"),
        ({"loss_temperature": 0.0}, "loss_temperature is 0.0; it has to be positive"),
        ({"loss_temperature": -1.0}, "loss_temperature is -1.0"),
        ({"cross_entropy_weight": -0.5}, "cross_entropy_weight is -0.5"),
        ({"method": "sft", "cross_entropy_weight": 0.0}, "there is nothing to minimise"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "high"}, "threshold is 'high'.*a number of nats, or auto"),
        ({"threshold": "auto", "target_teacher_share": 1.0}, "target_teacher_share is 1.0"),
        ({"threshold": "auto", "calibration_prompts": 0}, "calibration_prompts is 0"),
        ({"threshold": "auto", "recalibrate_every": -1}, "recalibrate_every is -1"),
        ({"recalibrate_every": 5}, "recalibrate_every is 5, but threshold is 0.3"),
        ({"decay": "sudden"}, "no decay named 'sudden'; choose one of exponential, linear, constant"),
        ({"decay_rate": 0.1, "final_fraction": 0.1}, "two ways to say the same thing"),
        ({"decay_rate": -0.1}, "decay_rate is -0.1"),
        ({"final_fraction": 0.0}, "final_fraction is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**settings)


@pytest.mark.parametrize("train_on", ["student", "teacher"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "switch"},
        {"method": "late", "teacher_share": 0.5},
        {"method": "late", "teacher_share": 0.0, "teacher_text_share": 0.5},
        {"method": "distillm2"},
    ],
)
def test_where_both_write_either_may_train_alone(settings: dict[str, Any], train_on: str) -> None:
    assert plan(train_on=train_on, **settings).objective.train_on == train_on


def test_a_method_is_found_by_its_exact_name_only() -> None:
    for name in METHODS:
        assert method_named(name) is METHODS[name]
        with pytest.raises(UserError, match="choose one of"):
            method_named(name + " ")


def test_the_tables_names_are_known() -> None:
    assert SwitchConfig.method in METHODS
    assert all(row.divergence in DIVERGENCES for row in METHODS.values() if row.divergence is not None)


class ReadSettings(SwitchConfig):
    """A configuration that knows which of its fields were asked for."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            self.__dict__.setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


def test_every_row_reads_the_settings_it_lists() -> None:
    listed: set[str] = set()
    for name, row in METHODS.items():
        config = ReadSettings(output_dir="unused", method=name)
        config._read.clear()
        plan_of(config)
        assert set(settings_of(name, row)) <= config._read
        listed |= set(settings_of(name, row))
    assert {*ROW_SETTINGS} <= config._read
    assert {"threshold", "teacher_share", "keep_top_k", "factor", "window", "teacher_text"} <= listed


def test_the_page_of_methods_is_that_of_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert page.read_text() == methods_page(METHODS), "switchkd methods --markdown > docs/methods.md"
