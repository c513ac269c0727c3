"""What people type who come from elsewhere, or get wrong, and the sentence that they read."""

from __future__ import annotations

import pytest

from switchkd.errors import UserError, did_you_mean
from switchkd.methods.config import SwitchConfig
from switchkd.run.file import HINTS, TRAINING_FIELDS, typed_setting
from switchkd.settings.foreign import FOREIGN


def said_of(key: str, value: object = 1) -> str:
    with pytest.raises(UserError) as error:
        typed_setting(key, value, "in run.yaml")
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- other tools' keys


@pytest.mark.parametrize(
    ("typed", "here"),
    [
        ("beta", "here it is divergence.teacher_weight"),
        ("lmbda", "here it is student_share"),
        ("lambda", "here it is student_share"),
        ("lr", "here it is learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("use_vllm", "nothing here does the same"),
        ("use_peft", "here it is peft"),
        ("torch_dtype", "here it is dtype"),
        ("max_completion_length", "here it is max_new_tokens"),
        ("max_seq_length", "here it is max_prompt_tokens and max_new_tokens"),
        ("max_length", "here it is max_prompt_tokens and max_new_tokens"),
        ("model", "here it is student"),
        ("model_name_or_path", "here it is student"),
        ("teacher_model", "here it is teacher"),
        ("teacher_model_name_or_path", "here it is teacher"),
        ("dataset", "here it is train_data"),
        ("dataset_name", "here it is train_data"),
        ("seq_kd", "here it is method: seqkd"),
        ("sft_alpha", "here it is cross_entropy_weight"),
        ("num_generations", "nothing here does the same"),
        ("device_map", "teacher_model_init_kwargs.device_map"),
        ("alpha", "divergence.teacher_weight and divergence.student_weight"),
        ("tau", "here it is threshold"),
        ("decay_factor", "here it is final_fraction and decay_rate"),
        ("chat_template", "here it is template_from"),
        ("enable_thinking", "here it is chat_template_kwargs: {enable_thinking: false}"),
        ("system_prompt", "nothing here does the same: put it into the data"),
        ("lora_r", "here it is peft.r"),
        ("load_in_4bit", "here it is teacher_quantization and student_quantization"),
        ("--Teacher-Model", "here it is teacher"),
    ],
)
def test_a_key_of_another_tool_is_led_to_what_it_is_here(typed: str, here: str) -> None:
    said = said_of(typed)
    assert here in said
    assert "did you mean" not in said


@pytest.mark.parametrize("key", ["attn_implementation", "device"])
def test_two_keys_that_led_astray_are_settings_by_now(key: str) -> None:
    assert key in HINTS


def test_the_table_names_only_settings_and_only_strangers() -> None:
    known = {*HINTS, "stages"}
    rows = [row for rows in FOREIGN.values() for row in rows]
    assert {key.split(".")[0] for row in rows for key in row.here.split()} <= known
    assert not [(row.names, key) for row in rows for key in known if row.matches(key)]
    assert all(row.here or row.advice for row in rows)
    named = [name for row in rows for name in row.names.split()]
    assert len(named) == len(set(named))


def test_python_is_told_the_same() -> None:
    with pytest.raises(UserError, match="here it is student_share"):
        SwitchConfig(lmbda=0.5)


def test_nothing_far_off_is_suggested_and_only_our_own_settings_are_listed() -> None:
    assert "did you mean 'threshold'?" in said_of("thresold")
    said = said_of("wibble")
    assert "did you mean" not in said
    listed = said.split("choose one of ")[1].split(", ")
    assert {"student", "threshold", "stages"} <= set(listed)
    assert "adam_beta2" in TRAINING_FIELDS
    assert "adam_beta2" not in listed
    assert "adam_beta2" not in did_you_mean("beta", ["adam_beta2"], ["threshold"])
