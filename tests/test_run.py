"""What a run file says: types, unknown keys, stages, and that what is saved says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainerControl, TrainerState, TrainingArguments

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.parts import HEADLINE
from switchkd.report.terminal import duration
from switchkd.rollout.blends import Interleave
from switchkd.rollout.policies import AdaSwitch, Switch
from switchkd.run import resume
from switchkd.run.callbacks import LogFile, read_log
from switchkd.run.file import HINTS, OWN_HINTS, RunConfig, read_run, run_from_values, typed_setting
from switchkd.run.folder import check_output_dir, record_run

BASE = {"student": "a", "teacher": "b", "train_data": "dolly", "output_dir": "runs/x"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "night.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "5e-4", 5e-4),
        ("max_steps", "1e3", 1000),
        ("max_steps", 12.0, 12),
        ("threshold", 1, 1.0),
        ("threshold", "2e-2", 0.02),
        ("threshold", "auto", "auto"),
        ("eval_strategy", False, "no"),
        ("decay_rate", None, None),
        ("report_to", ["wandb"], ["wandb"]),
        ("decay", "linear", "linear"),
        ("peft", {"r": 8}, {"r": 8}),
        ("block_size", "auto", "auto"),
        ("block_size", 4, 4),
        ("policy", "mix", "mix"),
        ("policy", {"name": "mix"}, {"name": "mix"}),
        ("threshold", {"every": 5}, {"every": 5}),
    ],
)
def test_values_take_the_type_of_their_field(key: str, value: Any, expected: Any) -> None:
    assert typed_setting(key, value, "in a test") == expected
    assert type(typed_setting(key, value, "in a test")) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", "many", "a whole number"),
        ("max_steps", 2.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", math.inf, "a whole number"),
        ("threshold", [0.3], "a number or a mapping or text"),
        ("policy", 3, "a mapping or text"),
        ("top_p", "high", "a number"),
        ("bf16", "yes", "true or false"),
        ("student", 5, "text"),
        ("decay", "sudden", "one of exponential, linear, constant"),
        ("eval_strategy", "sometimes", "one of no, steps, epoch"),
        ("peft", "r=8", "a mapping"),
    ],
)
def test_a_wrong_type_names_key_value_and_type(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        typed_setting(key, value, "in a test")
    assert key in str(error.value)
    assert repr(value) in str(error.value)
    assert expected in str(error.value)


@given(st.sampled_from(sorted(HINTS)), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_any_value_is_taken_or_refused_in_words(key: str, value: Any) -> None:
    try:
        typed_setting(key, value, "in a test")
    except UserError as error:
        assert key in str(error)  # noqa: PT017 - being taken is right too


@pytest.mark.parametrize("text", ["thresold: 1", "stages: [{thresold: 1}]"])
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"student: a\ntrain_data: dolly\n{text}\n")
    with pytest.raises(UserError, match=r"'thresold'.*did you mean 'threshold'"):
        read_run(path)


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (path := tmp_path / "run.yaml").write_text(
        "{student: ~/s, train_data: [~/a.jsonl, {path: ~/b.jsonl, weight: 2}], stages: [{method: kd, teacher: ~/t}]}"
    )
    run = read_run(path, ["output_dir=~/runs/a"])
    assert (run.student, run.output_dir) == (f"{tmp_path}/s", f"{tmp_path}/runs/a")
    assert run.train_data == [f"{tmp_path}/a.jsonl", {"path": f"{tmp_path}/b.jsonl", "weight": 2}]
    assert run.stages[0]["teacher"] == f"{tmp_path}/t"


def test_assignments_go_over_the_file_and_reach_stages(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump({**BASE, "max_steps": 5, "stages": [{"method": "kd"}, {"method": "switch"}]}))
    run = read_run(path, ["max_steps=7", "stages.1.max_steps=9", "peft.r=4", "learning_rate=2e-5"])
    assert run.training == {"max_steps": 7, "learning_rate": 2e-5}
    assert run.stages == ({"method": "kd"}, {"method": "switch", "max_steps": 9})
    assert run.peft == {"r": 4}


def test_a_part_is_a_name_or_a_mapping_and_a_dotted_key_reaches_into_it(tmp_path: Path) -> None:
    def policy(text: str, *assignments: str) -> Any:
        path = write(tmp_path, f"student: a\nteacher: b\ntrain_data: dolly\n{text}\n")
        (stage,) = read_run(path, assignments).in_stages()
        return stage.config.plan.policy

    assert policy("policy: interleave") == Interleave()
    assert policy("policy: interleave", "policy.keep_top_k=3") == Interleave(3)
    assert policy("method: skd", "policy.keep_top_k=3") == Interleave(3)
    assert policy("policy: {name: adaswitch, factor: 3e0}", "policy.window=4") == AdaSwitch(3.0, 4)
    assert policy("policy: {name: adaswitch, factor: 3e0}", "policy=interleave") == Interleave()
    assert policy("threshold: 2e-1") == Switch(0.2)
    path = write(tmp_path, "student: a\nteacher: b\ntrain_data: dolly\nthreshold: auto\n")
    (stage,) = read_run(path, ["threshold.every=20", "threshold.teacher_share=0.1"]).in_stages()
    assert (stage.config.plan.auto_threshold.every, stage.config.plan.auto_threshold.teacher_share) == (20, 0.1)


@pytest.mark.parametrize("text", ["keep_top_k: 3", "stages: [{keep_top_k: 3}]"])
def test_a_key_that_moved_names_its_new_place(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"student: a\ntrain_data: dolly\n{text}\n")
    with pytest.raises(UserError, match=r"keep_top_k is now a setting of the policy.*--set policy\.keep_top_k="):
        read_run(path)


@pytest.mark.parametrize("assignment", ["max_steps", "=3", "stages.4.max_steps=3", "student.x=3", "x=[1"])
def test_an_assignment_that_fits_nowhere_is_refused(tmp_path: Path, assignment: str) -> None:
    path = write(tmp_path, yaml.safe_dump(BASE))
    with pytest.raises(UserError, match=r"--set"):
        read_run(path, [assignment])


def test_the_folder_is_named_after_the_file_by_default(tmp_path: Path) -> None:
    assert read_run(write(tmp_path, "student: a\ntrain_data: dolly\n")).output_dir == "runs/night"


def test_stages_follow_each_other() -> None:
    changes = [{"method": "kd", "max_steps": 2}, {"method": "switch"}]
    run = run_from_values({**BASE, "max_steps": 9, "student_drop_layers": "1", "stages": changes}, "in a test")
    first, second = run.in_stages()
    assert (first.name, second.name) == ("1-kd", "2-switch")
    assert (first.run.student, second.run.student) == ("a", str(first.model_folder))
    assert (first.config.max_steps, second.config.max_steps) == (2, 9)
    assert (first.run.student_drop_layers, second.run.student_drop_layers) == ("1", None)
    assert second.model_folder == Path("runs/x")
    assert {str(first.folder), str(second.folder)} == {"runs/x/1-kd", "runs/x/2-switch"}
    assert second.tokenizer == "a"


def test_the_parser_of_transformers_reads_the_settings_too() -> None:
    arguments = ["--output_dir", "x", "--method", "switch", "--threshold", "0.2"]
    (config,) = HfArgumentParser(SwitchConfig).parse_args_into_dataclasses(arguments)
    assert (config.output_dir, config.method, config.threshold, config.report_to) == ("x", "switch", 0.2, [])
    assert config.block_size == "auto"
    (config,) = HfArgumentParser(SwitchConfig).parse_args_into_dataclasses([*arguments, "--block_size", "8"])
    assert config.block_size == 8


def test_a_stage_may_not_choose_its_folder() -> None:
    with pytest.raises(UserError, match="stages write into"):
        run_from_values({**BASE, "stages": [{"output_dir": "elsewhere"}]}, "in a test")


def test_what_is_saved_is_the_same_run_and_says_every_value(tmp_path: Path) -> None:
    stages = [{"method": "kd"}, {"threshold": "2e-1"}]
    given_values = {**BASE, "output_dir": str(tmp_path / "x"), "learning_rate": "1e-3", "stages": stages}
    run = run_from_values(given_values, "in a test")
    record_run(run)
    saved = read_run(tmp_path / "x" / "run.yaml")
    assert saved.effective_settings() == run.effective_settings()
    assert saved.stages == run.stages
    for ours, theirs in zip(saved.in_stages(), run.in_stages(), strict=True):
        # SWITCH's defaults are written out, where the run left them open.
        flat = dict.fromkeys(HEADLINE)
        assert ours.config.to_dict() | flat == theirs.config.to_dict() | flat
        assert ours.config.plan == theirs.config.plan
    assert {"threshold", "weight_decay", "seed", *OWN_HINTS} <= run.effective_settings().keys()


@pytest.mark.parametrize(
    "given_values", [{"policy": "mix"}, {"policy": {"threshold": 0.2}}, {"threshold": "auto"}, {"decay_rate": 0.1}]
)
def test_what_is_saved_makes_the_same_plan(tmp_path: Path, given_values: dict[str, Any]) -> None:
    run = run_from_values({**BASE, "output_dir": str(tmp_path / "x"), **given_values}, "in a test")
    record_run(run)
    (saved,), (stage,) = read_run(tmp_path / "x" / "run.yaml").in_stages(), run.in_stages()
    assert saved.config.plan == stage.config.plan


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"policy": {"name": "mix"}}, r"policy is .*started with None"),
        ({"max_steps": 50}, None),
        ({"logging_steps": 5, "save_steps": 3}, None),
        ({"threshold": 0.2}, r"threshold is 0.2.*started with .*auto"),
        ({"weight_decay": 0.5}, r"weight_decay is 0.5.*started with 0.0"),
        ({"stages": [{"method": "kd"}]}, r"0 stages, this run file 1"),
        # Where and how it is computed, as our own messages recommend.
        ({"activation_checkpointing": True, "teacher_offload": "cpu", "compile": False, "block_size": 4}, None),
        ({"gradient_checkpointing": True, "vllm": "http://127.0.0.1:8000"}, None),
        ({"teacher_quantization": "4bit"}, r"teacher_quantization is '4bit'.*started with None"),
        # On half of the processes, or twice as many.
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, None),
        ({"gradient_accumulation_steps": 2}, r"a step of this run had 8 rows when it began, and has 16 now"),
    ],
)
def test_a_resumed_run_may_change_its_length_but_not_its_nature(
    tmp_path: Path, changes: dict[str, Any], refused: str | None
) -> None:
    def run(**changes: Any) -> RunConfig:
        return run_from_values({**BASE, "output_dir": str(tmp_path / "x"), "max_steps": 5, **changes}, "in a test")

    record_run(run())
    if refused is None:
        check_output_dir(run(**changes), resume=True)
        return
    with pytest.raises(UserError, match=refused):
        check_output_dir(run(**changes), resume=True)


@pytest.mark.parametrize(
    ("begun", "teacher", "is_same"),
    [
        ("http://a:8000", "http://b:9000", True),
        ("http://a:8000#big", "http://b:8000#big", True),
        ("http://a:8000#big", "http://a:8000#small", False),
        ("http://a:8000", "b", False),
    ],
)
def test_a_server_may_be_at_another_address(tmp_path: Path, begun: str, teacher: str, is_same: bool) -> None:
    def run(**changes: Any) -> RunConfig:
        base = {key: value for key, value in BASE.items() if key != "teacher"}
        return run_from_values({**base, "output_dir": str(tmp_path / "x"), **changes}, "in a test")

    for named in ({"teacher": begun}, {"teachers": {"one": begun, "two": "c"}}):
        record_run(run(**named))
        now_named = {"teacher": teacher} if "teacher" in named else {"teachers": {"one": teacher, "two": "c"}}
        if is_same:
            check_output_dir(run(**now_named), resume=True)
            continue
        with pytest.raises(UserError, match=r"teachers? is .*the run in"):
            check_output_dir(run(**now_named), resume=True)


def test_tokens_are_not_written_and_may_be_given_again(tmp_path: Path) -> None:
    secrets = {"hub_token": "hf_secret", "model_init_kwargs": {"token": "hf_secret", "revision": "main"}}
    stages = [{"hub_token": "hf_secret", "teacher_model_init_kwargs": {"token": "hf_secret"}}]
    run = run_from_values({**BASE, "output_dir": str(tmp_path / "x"), **secrets, "stages": stages}, "in a test")
    record_run(run)
    text = (tmp_path / "x" / "run.yaml").read_text()
    assert "hf_secret" not in text
    assert yaml.safe_load(text)["model_init_kwargs"] == {"revision": "main"}
    check_output_dir(run, resume=True)
    check_output_dir(read_run(tmp_path / "x" / "run.yaml"), resume=True)
    # The run goes on with the token that it was given; only what is written lacks it.
    assert run.training["hub_token"] == "hf_secret"


def test_the_processes_go_on_from_the_checkpoint_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from a second process, which stands for a machine with a disk of its own."""
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(resume, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(resume, "gather_object", lambda there: [True, *there])
    for chosen, expected in (("checkpoint-2", tmp_path / "checkpoint-2"), (None, None)):
        monkeypatch.setattr(resume, "broadcast_object_list", lambda _, name=chosen: [name])
        assert resume.agreed_checkpoint(tmp_path) == expected
    monkeypatch.setattr(resume, "broadcast_object_list", lambda _: ["checkpoint-6"])
    with pytest.raises(UserError, match=r"goes on from .*checkpoint-6, which process 1 does not have"):
        resume.agreed_checkpoint(tmp_path)


def test_of_a_run_that_kept_no_rows_a_step_the_batch_stays(tmp_path: Path) -> None:
    run = run_from_values({**BASE, "output_dir": str(tmp_path / "x")}, "in a test")
    record_run(run)
    (tmp_path / "x" / "environment.json").write_text("{}")
    check_output_dir(run, resume=True)
    other = run_from_values({**BASE, "output_dir": str(tmp_path / "x"), "per_device_train_batch_size": 4}, "in a test")
    with pytest.raises(UserError, match="per_device_train_batch_size is 4, but the run"):
        check_output_dir(other, resume=True)


def test_the_clock_of_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "a", "step": 2, "seconds": 500.0}\n{"stage": "b", "step": 1, "seconds": 9000.0}\n')
    log, state = LogFile(path, "a"), TrainerState(global_step=2, is_world_process_zero=True)
    log.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl())
    log.on_log(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl(), logs={"loss": 1.0})
    # Whatever this test takes comes on top.
    assert 500 <= json.loads(path.read_text().splitlines()[-1])["seconds"] < 600


def test_of_a_step_logged_twice_the_last_counts_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = ['{"stage": "", "step": 1, "loss": 3}', '{"stage": "", "step": 2, "loss": 2}']
    path.write_text("\n".join([*lines, '{"stage": "", "step": 2, "loss": 1}', '{"stage": "", "st']))
    assert [(event["step"], event["loss"]) for event in read_log(path)] == [(1, 3), (2, 1)]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.21, "4.2 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
