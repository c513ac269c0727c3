"""A method is a row of a table; every field of it that a setting replaces is the one in force."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.distributions.divergences import (
    DIVERGENCES,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from switchkd.errors import UserError
from switchkd.loss.release import Release
from switchkd.loss.weights import ByWriter
from switchkd.methods.config import SwitchConfig
from switchkd.methods.parts import HEADLINE, MOVED
from switchkd.methods.plan import AutoThreshold, Plan
from switchkd.methods.table import METHOD, METHODS, REPLACEABLE, Method
from switchkd.report.methods_page import method_settings, methods_page
from switchkd.rollout.blends import Interleave, Mix
from switchkd.rollout.law import Student
from switchkd.rollout.policies import POLICIES, POLICY, Early, Late, Switch
from switchkd.settings.components import settings_of


def plan(**settings: Any) -> Plan:
    return SwitchConfig(output_dir="unused", **settings).plan


def divergence_in_force(settings: dict[str, Any]) -> torch.Tensor:
    """The plan's divergence between two fixed distributions."""
    function = plan(**settings).objective.divergence
    assert function is not None
    return function(STUDENT_LOGP, TEACHER_LOGP)


OF_STUDENT, OF_TEACHER = ByWriter(teacher=0.0), ByWriter(student=0.0)
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
    assert made.objective.divergence == row.divergence
    assert made.needs_teacher == (name != "sft")
    assert made.objective.divergence is not None or made.objective.cross_entropy_weight > 0


def test_the_divergence_can_be_replaced_in_every_method() -> None:
    for name in METHODS:
        for given in ("reverse_kl", {"name": "reverse_kl"}, ReverseKL()):
            assert plan(method=name, divergence=given).objective.divergence == ReverseKL()


def test_settings_without_a_name_change_the_rows_own_part_and_a_name_starts_from_its_defaults() -> None:
    assert plan(method="gkd").objective.divergence == JensenShannon(0.1)
    assert plan(method="gkd", divergence={"teacher_weight": 0.5}).objective.divergence == JensenShannon(0.5)
    assert plan(method="gkd", divergence="jensen_shannon").objective.divergence == JensenShannon(0.5)
    assert plan(method="gkd", divergence="forward_kl").objective.divergence == ForwardKL()
    named = {"name": "jensen_shannon", "teacher_weight": "2e-1"}
    assert plan(method="kd", divergence=named).objective.divergence == JensenShannon(0.2)
    assert plan(method="minillm", policy={"teacher_share": 0.4}).policy == Mix(0.4)
    assert plan(method="minillm", policy={"name": "late"}).policy == Late(0.2)


@pytest.mark.parametrize(("name", "setting"), [(n, key) for n, row in DIVERGENCES.items() for key in settings_of(row)])
def test_every_setting_of_every_divergence_is_in_force(name: str, setting: str) -> None:
    given = {"method": "kd", "divergence": {"name": name, setting: 0.35}}
    expected = DIVERGENCES[name](**{setting: 0.35})
    assert divergence_in_force(given) == expected(STUDENT_LOGP, TEACHER_LOGP)
    # At the default of 0.5 the head of these two is the same as at 0.35.
    assert setting == "head_mass" or divergence_in_force(given) != divergence_in_force(
        {"method": "kd", "divergence": name}
    )


@pytest.mark.parametrize(("name", "setting"), [(n, key) for n, row in POLICIES.items() for key in settings_of(row)])
def test_every_setting_of_every_policy_is_in_force(name: str, setting: str) -> None:
    other = {"decay": "linear", "keep_top_k": 3, "window": 3, "anneal_steps": 7}.get(setting, 0.35)
    policy = plan(method="switch", policy={"name": name, setting: other}).policy
    assert type(policy) is POLICIES[name]
    assert getattr(policy, setting) == other != getattr(POLICIES[name](), setting)


# What replaces each setting of a row or a policy, and where it arrives.
REPLACED: dict[str, tuple[dict[str, Any], Callable[[Plan], Any]]] = {
    "long_term_weight": ({"method": "minillm", "long_term_weight": 0.5}, lambda made: made.objective.long_term_weight),
    "teacher_text_share": ({"method": "gkd", "teacher_text_share": 0.25}, lambda made: made.teacher_text_share),
    "share_rise": ({"method": "distillm", "share_rise": 0.2}, lambda made: made.share_rise),
    "replay_capacity": ({"method": "switch", "replay_capacity": 7}, lambda made: made.replay_capacity),
    "replay_share": ({"method": "distillm", "replay_share": 0.75}, lambda made: made.replay_share),
    "teacher_text": ({"method": "seqkd", "teacher_text": "there.jsonl"}, lambda made: str(made.teacher_text)),
    "cross_entropy_weight": (
        {"method": "kd", "cross_entropy_weight": 0.25},
        lambda made: made.objective.cross_entropy_weight,
    ),
    "student_share": ({"method": "gkd", "student_share": 0.25}, lambda made: made.rollout_share),
}


@pytest.mark.parametrize("setting", REPLACED)
def test_a_setting_of_a_row_is_replaced_by_the_runs(setting: str) -> None:
    given, arrives = REPLACED[setting]
    assert arrives(plan(**given)) == given[setting]


def test_rows_bring_their_own_settings() -> None:
    assert plan(method="minillm").policy == Mix(0.2)
    # The share that SWITCH finds its threshold for.
    assert plan(method="random").policy == Mix(0.2)
    assert plan(method="early").policy == Early(0.2)
    assert plan(method="late").policy == Late(0.2)
    assert plan(method="skd").policy == Interleave(25)
    assert plan(method="distillm").replay_capacity == 1000
    assert plan(method="seqkd").teacher_text == Path("unused/teacher_text.jsonl")
    assert not plan(method="seqkd").needs_response


def test_the_teachers_text_has_a_divergence_of_its_own() -> None:
    objective = plan(
        method="distillm2", divergence={"student_weight": 0.3}, teacher_text_divergence={"teacher_weight": 0.2}
    ).objective
    assert objective.divergence is not None
    student, teacher = STUDENT_LOGP.expand(2, 3), TEACHER_LOGP.expand(2, 3)
    by_student, by_teacher = objective.divergence_shared(student, teacher, torch.tensor([0.0, 1.0]))
    assert by_student == SkewedReverseKL(0.3)(STUDENT_LOGP, TEACHER_LOGP)
    assert by_teacher == SkewedForwardKL(0.2)(STUDENT_LOGP, TEACHER_LOGP)
    mixed = plan(method="switch", teacher_text_divergence="reverse_kl").objective
    by_student, by_teacher = mixed.divergence_shared(student, teacher, torch.tensor([0.0, 1.0]))
    assert by_student == ForwardKL()(STUDENT_LOGP, TEACHER_LOGP)
    assert by_teacher == ReverseKL()(STUDENT_LOGP, TEACHER_LOGP)


def test_settings_of_the_loss_are_in_force() -> None:
    options = {"student_share": 0.5, "cross_entropy_weight": 0.25, "loss_temperature": 2.0}
    objective = plan(method="switch", **options).objective
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
    whole = Switch(threshold=0.2, decay_rate=0.01)
    assert (
        plan(method="switch", policy=whole).policy
        == plan(policy={"threshold": 0.2, "decay_rate": 0.01}).policy
        == whole
    )
    # The stages of a run share them.
    assert plan(method="gkd", threshold=0.2).policy == Student()


def test_auto_is_an_object_from_the_start() -> None:
    found = AutoThreshold(teacher_share=0.1, every=50)
    for given in (found, {"teacher_share": 0.1, "every": 50}, {"name": "auto", "teacher_share": "1e-1", "every": 50}):
        assert plan(threshold=given).auto_threshold == found
    assert plan(threshold="auto", decay="linear").auto_threshold == AutoThreshold()
    assert plan(threshold="auto", decay="linear").policy == Switch(decay="linear")
    assert plan(method="gkd", threshold="auto").auto_threshold is None


def test_switch_finds_its_threshold_unless_one_is_given() -> None:
    for options in (
        {},
        {"method": "switch"},
        {"policy": {"final_fraction": 0.2}},
        {"method": "gkd", "policy": "switch"},
    ):
        assert plan(**options).auto_threshold == AutoThreshold(teacher_share=0.2)
    own = Method("own", policy=Switch(0.2), student_share=1.0, divergence=ForwardKL())
    given = ({"threshold": 0.2}, {"policy": {"threshold": 0.2}}, {"policy": Switch(0.2)}, {"method": own})
    for options in given:
        made = plan(**options)
        assert (made.auto_threshold, made.policy) == (None, Switch(0.2))


def test_a_configuration_is_written_as_what_it_was_made_of() -> None:
    config = SwitchConfig(output_dir="unused", policy=Mix(0.4), divergence=JensenShannon(0.3))
    written = json.loads(config.to_json_string())
    assert written["policy"] == {"name": "mix", "teacher_share": 0.4}
    assert written["divergence"] == {"name": "jensen_shannon", "teacher_weight": 0.3}
    assert copy.deepcopy(config).plan == config.plan
    assert dataclasses.replace(config, divergence=None).plan.objective.divergence == ForwardKL()


@pytest.mark.parametrize("key", MOVED)
def test_a_setting_that_moved_names_its_new_place(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is now a setting of the .*--set {MOVED[key]}="):
        SwitchConfig(output_dir="unused", **{key: 1})


def test_everything_of_one_part_has_left_the_flat_list() -> None:
    flat = {each.name for each in dataclasses.fields(SwitchConfig)}
    parts = [*POLICIES.values(), *DIVERGENCES.values()]
    assert {key for part in parts for key in settings_of(part)} & flat == set(HEADLINE)


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
        ({"method": "gkd", "divergence": "js"}, "no divergence named 'js'"),
        (
            {"method": "kd", "divergence": {"teacher_weight": 0.5}},
            "teacher_weight is 0.5, but divergence 'forward_kl' takes no settings",
        ),
        (
            {"method": "sft", "divergence": {"teacher_weight": 0.5}},
            "divergence is .*; give it a name, one of forward_kl",
        ),
        (
            {"method": "gkd", "divergence": {"student_weight": 0.5}},
            "student_weight is 0.5, but divergence 'jensen_shannon' takes teacher_weight; leave it out",
        ),
        ({"divergence": {"name": "alpha_beta", "teacher_power": 0.0}}, "teacher_power is 0.0; it has to be positive"),
        ({"divergence": {"name": "alpha_beta", "teacher_power": "x"}}, "divergence.teacher_power is 'x'; .* a number"),
        (
            {"method": "gkd", "divergence": {"teacher_weight": 0.0}},
            "teacher_weight is 0.0; .* strictly between 0 and 1",
        ),
        ({"divergence": [1]}, r"divergence is \[1\]; give a name, or a mapping"),
        ({"method": "skd", "policy": {"keep_top_k": 0}}, "keep_top_k is 0; .* at least its 1 best"),
        ({"method": "skd", "policy": {"keep_top_k": 2.5}}, "policy.keep_top_k is 2.5; it has to be a whole number"),
        ({"policy": "pupil"}, "no policy named 'pupil'; choose one of student, teacher, switch"),
        ({"threshold": 0.1, "policy": {"threshold": 0.2}}, "threshold is 0.1, but the policy brings its own"),
        ({"decay": "linear", "policy": Switch(0.2)}, "decay is linear, but the policy brings its own"),
        (
            {"method": "kd", "weight": OF_STUDENT},
            "weight by_writer acts on the tokens of rollouts, .* no rollouts here",
        ),
        ({"method": "seqkd", "weight": OF_TEACHER}, "acts on the tokens of rollouts"),
        ({"method": "trd", "weight": "trust"}, "weight trust acts on .* text that the teacher rewrites here"),
        ({"method": "gkd", "weight": OF_TEACHER}, "written by student, so no token .* weight of student above 0"),
        ({"method": "gkd", "student_share": 0.5, "weight": OF_TEACHER}, "written by student, "),
        ({"method": "late", "policy": {"teacher_share": 0.0}, "weight": OF_TEACHER}, "written by student, "),
        ({"method": "late", "policy": {"teacher_share": 1.0}, "weight": OF_STUDENT}, "written by teacher, "),
        ({"method": "distillm2", "teacher_text_share": 1.0, "weight": OF_STUDENT}, "written by teacher, "),
        ({"weight": ByWriter(0.0, 0.0)}, "written by student and teacher"),
        ({"weight": {"student": 0.5}}, "weight is .*; give it a name, one of uniform, by_writer, prefix"),
        ({"weight": ["trust", "trust"]}, "two weights compare outliers by a divergence of their own"),
        ({"weight": "trust", "teacher_text_divergence": "reverse_kl"}, "teacher_text_divergence is set, but a weight"),
        (
            {"method": "iw_opd", "temperature": 0.5},
            "weight importance needs text drawn from the models' own distributions",
        ),
        ({"method": "iw_opd", "weight": {"gamma": -1.0}}, "weight.gamma is -1.0"),
        ({"method": "iw_opd", "weight": {"beta": 1.0}}, "beta is 1.0, but weight 'importance' takes gamma"),
        ({"method": "sft", "target": "proximal"}, "target is proximal, but method 'sft' has no divergence"),
        ({"method": "sft", "start_weight": 0.1}, "start_weight is 0.1, but method 'sft' has no divergence"),
        ({"start_weight": -0.1}, "start_weight is -0.1"),
        ({"method": "kd", "length_growth": {"start": 4}}, "length_growth is .*, but method 'kd' has no rollouts here"),
        (
            {"method": "trd", "replayed_prefix": {"weight": 1.0}},
            "replayed_prefix is set, but .* leave one of the two out",
        ),
        (
            {"method": "trd", "replay_capacity": 4},
            "replay_capacity is set, but it acts on rollouts as they were written",
        ),
        ({"method": "trd", "long_term_weight": 1.0}, "long_term_weight is set, but"),
        (
            {"method": "trd", "teacher_text_divergence": "reverse_kl", "teacher_text_share": 0.5},
            "teacher_text_divergence is set, but it acts on rollouts as they were written",
        ),
        ({"method": "gkd", "teacher_text_divergence": "reverse_kl"}, "no token of the rollouts is the teacher's"),
        ({"start_divergence": "reverse_kl"}, "start_divergence is reverse_kl, but start_weight is 0"),
        (
            {"method": "imitkd", "cross_entropy_weight": 0.5, "cross_entropy_on": "data+teacher"},
            "all text here is rolled out by the student, so it would do nothing; .*set cross_entropy_on to all",
        ),
        ({"method": "switch", "cross_entropy_weight": 0.5}, "set cross_entropy_on to data[+]teacher, or leave it out"),
        ({"method": "tropd", "teacher_signal": {"top_k": 20}}, "weight.top_k is 64, but .*only the 20 likeliest"),
        ({"method": "prefix", "weight": {"tokens": 50}}, "name: prefix, tokens: 50"),
        ({"method": "release", "weight": [Release(8), Release(16)]}, "margin over 8 and 16 candidates, but a rollout"),
        ({"train_on": "student"}, "train_on is now a weight; write weight: {name: by_writer, teacher: 0}"),
        ({"method": "gkd", "policy": {"keep_top_k": 3}}, "keep_top_k is 3, but policy 'student' takes no settings"),
        (
            {"method": "switch", "policy": {"teacher_share": 0.3}},
            "teacher_share is 0.3, but policy 'switch' takes threshold",
        ),
        ({"method": "kd", "policy": "mix"}, "policy is mix, but method 'kd' has no rollouts here"),
        ({"method": "switch", "teacher_text": "x"}, "teacher_text is x, but method 'switch' does not read it"),
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
        ({"method": "random", "policy": {"teacher_share": 1.5}}, "teacher_share is 1.5"),
        ({"loss_temperature": 0.0}, "loss_temperature is 0.0; it has to be positive"),
        ({"loss_temperature": -1.0}, "loss_temperature is -1.0"),
        ({"cross_entropy_weight": -0.5}, "cross_entropy_weight is -0.5"),
        ({"method": "switch", "cross_entropy_weight": 0.5}, r"cross_entropy_weight is 0\.5.*it would do nothing"),
        ({"method": "minillm", "rollout_steps": 4}, "long_term_weight is 1.0, which needs .* set rollout_steps to 1"),
        ({"cross_entropy_on": "teacher"}, "cross_entropy_on is 'teacher'; choose one of data, data\\+teacher, all"),
        (
            {"method": Method("x", cross_entropy_weight=1.0, student_share=1.0)},
            "cross-entropy alone, on text of the data",
        ),
        ({"method": "gkd", "train_turns": "all"}, "train_turns is 'all', but method 'gkd' has text written"),
        ({"method": "seqkd", "train_turns": "all"}, "train_turns is 'all', but method 'seqkd' has text written"),
        ({"train_turns": "first"}, "train_turns is 'first'; choose one of last, all"),
        ({"method": "sft", "cross_entropy_weight": 0.0}, "there is nothing to minimize"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        (
            {"threshold": 0.6932},
            r"threshold is 0.6932, but the divergence is at most ln 2 = 0.693 nats.*take less, or auto",
        ),
        ({"policy": {"threshold": 3.0}}, "threshold is 3.0, but the divergence is at most"),
        ({"policy": Switch(3.0)}, "threshold is 3.0, but the divergence is at most"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "high"}, "threshold is 'high'.*a number of nats, or auto"),
        ({"threshold": {"teacher_share": 1.0}}, "threshold.teacher_share is 1.0"),
        ({"threshold": {"prompts": 0}}, "threshold.prompts is 0"),
        ({"threshold": {"every": -1}}, "threshold.every is -1"),
        ({"threshold": {"evry": 1}}, "evry is 1, but threshold 'auto' takes teacher_share, prompts, every"),
        ({"rollout_rows": 0}, "rollout_rows is 0; it has to be at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0; it has to be at least 1"),
        ({"block_size": "fast"}, "block_size is 'fast'; give 1 or more tokens, or auto"),
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


@pytest.mark.parametrize("weight", [OF_STUDENT, OF_TEACHER], ids=["student", "teacher"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "switch"},
        {"method": "late", "policy": {"teacher_share": 0.5}},
        {"method": "late", "policy": {"teacher_share": 0.0}, "teacher_text_share": 0.5},
        {"method": "distillm2"},
    ],
)
def test_where_both_write_either_may_train_alone(settings: dict[str, Any], weight: ByWriter) -> None:
    assert plan(weight=weight, **settings).objective.weights == (weight,)


def test_a_method_is_found_by_its_exact_name_only() -> None:
    for name in METHODS:
        assert METHOD.find(name) is METHODS[name]
        with pytest.raises(UserError, match="choose one of"):
            METHOD.find(name + " ")


def test_a_method_of_ones_own_is_a_row_with_its_parts_replaced() -> None:
    own = dataclasses.replace(METHODS["minillm"], policy=Mix(teacher_share=0.3), divergence=ForwardKL())
    made = plan(method=own, long_term_weight=0.5)
    assert (made.policy, made.objective.divergence, made.objective.long_term_weight) == (Mix(0.3), ForwardKL(), 0.5)


def test_what_a_run_may_replace_is_in_the_row_and_in_the_configuration() -> None:
    row = {each.name for each in dataclasses.fields(Method)}
    settings = {each.name: each for each in dataclasses.fields(SwitchConfig)}
    assert set(REPLACEABLE) <= row
    assert all(settings[key].default is None for key in REPLACEABLE)
    assert row - set(REPLACEABLE) == {"summary", "source", "departs", "teacher_writes_data", "finds_threshold", "start"}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_that_is_listed_acts(name: str) -> None:
    """What is listed as in force, given in full, makes the same plan."""
    given: dict[str, Any] = {}
    for key, value, sentence in method_settings(METHODS[name]):
        part, _, inner = key.partition(".")
        assert sentence
        given[part] = {**POLICY.as_mapping(given[part]), inner: value} if inner else value
    assert plan(method=name, **given) == plan(method=name)


def test_the_page_of_methods_is_that_of_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert page.read_text() == methods_page(METHODS), "switchkd methods --markdown > docs/methods.md"
