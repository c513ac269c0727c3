"""Equal runs, resumed runs, and checkpoints that cannot be written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchkd.errors import UserError
from switchkd.training.checkpoints import (
    FOLDER_PREFIX,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    has_optimizer,
    last_complete_checkpoint,
    writing_checkpoint,
)
from tiny import tiny_pair
from trainers import (
    RecordingEngine,
    assert_same_weights,
    history,
    make_trainer,
    rolled_out,
    weights,
)


@pytest.mark.parametrize("method", ["sft", "switch"])
def test_two_runs_are_equal_bit_for_bit(method: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    ours, theirs = (make_trainer(tmp_path, pair, method=method, split=(2, 2)) for _ in range(2))
    ours.train()
    theirs.train()
    assert_same_weights(weights(ours), weights(theirs))
    assert history(ours) == history(theirs)


# GPT-2 has dropout, so the generator's state counts too; steps 3 and 4 lie in the middle and at the end of an epoch.
@pytest.mark.parametrize("saved_at", [3, 4])
@pytest.mark.parametrize(
    "method", [{"method": "switch"}, {"method": "gkd", "student_share": 0.5}], ids=lambda method: method["method"]
)
def test_resumed_equals_uninterrupted_bit_for_bit(method: dict[str, Any], saved_at: int, tmp_path: Path) -> None:
    pair = tiny_pair("gpt2")
    options = {**method, "max_steps": 6, "save_strategy": "steps", "save_steps": saved_at, "split": (2, 2)}
    whole = make_trainer(tmp_path, pair, **options)
    texts = rolled_out(whole)
    resumed = make_trainer(tmp_path, pair, **options)
    engine = RecordingEngine(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert [[rollout.token_ids for rollout in call] for call in engine.calls] == texts[-len(engine.calls) :]
    assert len(engine.calls) == 6 - saved_at
    assert_same_weights(weights(whole), weights(resumed))
    ours, theirs = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    for index, moments in ours.items():
        assert_same_weights(moments, theirs[index])
    # The last line is about the steps of its own call.
    assert history(whole)[:-1] == history(resumed)[:-1]


def test_a_resumed_run_logs_and_saves_as_it_is_told_now(tmp_path: Path) -> None:
    options = {"method": "sft", "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    make_trainer(tmp_path, tiny_pair("llama"), **options).train()
    resumed = make_trainer(
        tmp_path, tiny_pair("llama"), **{**options, "max_steps": 8, "save_steps": 3, "logging_steps": 2}
    )
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 6, 8)]
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 4, 6, 8]


def test_a_run_whose_budget_ended_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "imitkd", "max_steps": 50, "save_strategy": "steps", "save_steps": 100}
    first = make_trainer(tmp_path, tiny_pair("llama"), **options, max_generated_tokens=60)
    first.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / f"checkpoint-{first.state.global_step}"
    assert first.state.log_history[-1]["teacher_generated_tokens"] == 0
    # As an earlier version wrote it.
    path = tmp_path / f"checkpoint-{first.state.global_step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["switchkd"]["costs"]["teacher_generated_tokens"]
    path.write_text(json.dumps(state))
    second = make_trainer(tmp_path, tiny_pair("llama"), **options, max_generated_tokens=120)
    engine = RecordingEngine(second)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == first.state.global_step + len(engine.calls)
    assert second.state.log_history[-1]["generated_tokens"] >= 120
    assert "teacher_generated_tokens" not in second.state.log_history[-1]


def test_resuming_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    options = {"method": "sft", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, tiny_pair("llama"), **options)
    whole.train()
    # What a killed process leaves: weights, and no trainer's state.
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = make_trainer(tmp_path, tiny_pair("llama"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_weights(weights(whole), weights(resumed))


def test_resuming_without_a_whole_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        make_trainer(tmp_path, tiny_pair("llama"), method="sft").train(resume_from_checkpoint=True)


def test_nothing_goes_on_from_weights_alone(tmp_path: Path) -> None:
    options = {"method": "sft", "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(tmp_path, tiny_pair("llama"), **options, max_steps=2).train()
    with pytest.raises(UserError, match=r"checkpoint-2 holds no optimizer and scheduler state \(save_only_model"):
        make_trainer(tmp_path, tiny_pair("llama"), **options, max_steps=4).train(resume_from_checkpoint=True)


def test_what_deepspeed_keeps_is_a_state_to_go_on_from(tmp_path: Path) -> None:
    assert not has_optimizer(tmp_path)
    (tmp_path / "global_step4").mkdir()
    assert has_optimizer(tmp_path)


def test_a_checkpoint_whose_state_was_cut_off_is_no_complete_one(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (4, '{"epoch": 1, "glo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "switch", "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    pair = tiny_pair("llama")
    write = transformers.modeling_utils.safe_save_file

    def write_until_full(tensors: dict[str, Tensor], filename: str, metadata: dict[str, str] | None = None) -> None:
        if "checkpoint-4" in str(filename):
            Path(filename).write_bytes(b"cut off")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, filename, metadata)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write_until_full)
    with pytest.raises(UserError, match=r"checkpoint-4.*No space left.*last good one is .*checkpoint-2"):
        make_trainer(tmp_path, pair, **options).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

    monkeypatch.undo()
    resumed = make_trainer(tmp_path, pair, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", pair, **options)
    whole.train()
    assert_same_weights(weights(resumed), weights(whole))


def test_a_failed_push_leaves_the_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "sft", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, tiny_pair("llama"), **options)

    def push(folder: str) -> None:
        raise ConnectionError("the hub is not reachable")

    monkeypatch.setattr(trainer, "_push_from_checkpoint", push)
    # Set after the trainer was made, which would ask the hub for the repository.
    trainer.args.push_to_hub = True
    with pytest.raises(ConnectionError, match="not reachable"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = make_trainer(tmp_path, tiny_pair("llama"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(trainer))


@pytest.mark.parametrize("error", [OSError, RuntimeError, SafetensorError])
@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_removes_a_part_of_a_checkpoint(
    error: type[Exception], is_main: bool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    with pytest.raises(UserError, match="there is no earlier one"), writing_checkpoint(checkpoint, is_main=is_main):
        raise error
    assert checkpoint.exists() != is_main


def test_errors_of_other_kinds_pass_and_remove_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    with pytest.raises(KeyError), writing_checkpoint(checkpoint, is_main=True):
        raise KeyError
    assert checkpoint.exists()


def test_an_overwritten_checkpoint_that_is_cut_off_is_no_complete_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / STATE_FILE).write_text("{}")
    with pytest.raises(UserError), writing_checkpoint(checkpoint, is_main=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not checkpoint.exists()


def test_the_names_are_those_of_transformers() -> None:
    assert (FOLDER_PREFIX, STATE_FILE) == (PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME)
    assert (OPTIMIZER_FILE, SCHEDULER_FILE) == (OPTIMIZER_NAME, SCHEDULER_NAME)
