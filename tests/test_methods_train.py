"""Every method of the table trains: its loss falls on a few examples, and what a run keeps of its text survives a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.errors import UserError
from switchkd.methods.table import METHODS
from switchkd.records import Rollout
from switchkd.rollout.law import Teacher
from switchkd.training.replay import FILE_NAME, ReplayBuffer
from tiny import tiny_pair, tiny_tokenizer
from trainers import EXAMPLES, PROMPTS_ONLY, RecordingEngine, assert_same_weights, history, make_trainer, weights

# DistiLLM's share is nothing at the start, and rises with evaluations.
EVALUATED: dict[str, Any] = {"eval_dataset": EXAMPLES[:2], "eval_strategy": "steps", "eval_steps": 10}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_each_method_falls(method: str, tmp_path: Path) -> None:
    # Only a rewriting teacher is asked in words.
    tokenizer = tiny_tokenizer() if METHODS[method].rewrite else None
    pair = tiny_pair("llama", layers=1, scale=5.0, noise=0.5, tokenizer=tokenizer)
    options = {"max_steps": 20, "learning_rate": 1e-2, "adam_beta2": 0.95, "max_new_tokens": 6}
    more = EVALUATED if method == "distillm" else {}
    trainer = make_trainer(tmp_path, pair, EXAMPLES[:4], method=method, **options, **more)
    trainer.train()
    # Of a policy gradient, the loss has the gradient, not the value.
    key = "divergence" if METHODS[method].divergence else "loss"
    measured = [line[key] for line in trainer.state.log_history if "loss" in line and key in line]
    assert len(measured) == 20
    assert sum(measured[-5:]) < sum(measured[:5]) / 1.3


# ------------------------------------------------------------------------------------------------- the teacher's text


def test_the_teacher_writes_once_and_a_resumed_run_reads_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqkd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    pair = tiny_pair("llama")
    whole = make_trainer(tmp_path, pair, PROMPTS_ONLY, **options)
    engine = RecordingEngine(whole)
    whole.train()
    (written,) = engine.calls
    assert all(rollout.teacher_share == 1 for rollout in written)
    lines = [json.loads(line) for line in (tmp_path / "teacher_text.jsonl").read_text().splitlines()]
    assert [tuple(line["response_ids"]) for line in lines] == [rollout.token_ids for rollout in written]
    assert [example.response_ids for example in whole.train_dataset] == [rollout.token_ids for rollout in written]
    resumed = make_trainer(tmp_path, pair, PROMPTS_ONLY, **options)
    second = RecordingEngine(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.calls == []
    assert_same_weights(weights(whole), weights(resumed))


def test_a_writing_that_was_cut_off_goes_on_and_costs_what_both_attempts_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounds of one prompt each; a clock that is a second further at each call of the engine.
    now = 0
    monkeypatch.setattr("switchkd.training.teacher_text._FILLINGS", 1)
    monkeypatch.setattr("switchkd.training.costs.time.process_time", lambda: float(now))
    pair = tiny_pair("llama", layers=1)

    def attempt(last: int, folder: Path = tmp_path, **more: Any) -> Any:
        trainer = make_trainer(folder, pair, PROMPTS_ONLY[:4], method="seqkd", max_steps=2, rollout_rows=1, **more)
        write, calls = trainer.engine.generate, 0

        def generate(*given: Any, **named: Any) -> Any:
            nonlocal now, calls
            now, calls = now + 1, calls + 1
            if calls > last:
                raise KeyboardInterrupt
            return write(*given, **named)

        monkeypatch.setattr(trainer.engine, "generate", generate)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        attempt(3).train()
    second = attempt(9)
    second.train()
    # Three rounds were kept, and the fourth is done again.
    assert now == 5
    assert second.costs.spent.training_seconds == 4
    third = attempt(0)
    third.train()
    assert third.costs.spent.training_seconds == 4
    elsewhere = attempt(0, tmp_path / "other", teacher_text=str(tmp_path / "teacher_text.jsonl"))
    elsewhere.train()
    assert elsewhere.costs.spent.training_seconds == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"temperature": 0.5}, "sampling"), ({"train_dataset": PROMPTS_ONLY[:4]}, "prompts")],
    ids=lambda value: str(value)[:12],
)
def test_other_teachers_text_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqkd", "max_steps": 1, "teacher_text": str(tmp_path / "shared.jsonl")}
    pair = tiny_pair("llama", layers=1)
    make_trainer(tmp_path, pair, **{"train_dataset": PROMPTS_ONLY, **options}).train()
    with pytest.raises(UserError, match=f"was made with other {named} .*delete it"):
        make_trainer(tmp_path, pair, **{"train_dataset": PROMPTS_ONLY, **options, **change}).train()


def test_another_teacher_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqkd", "max_steps": 1}
    make_trainer(tmp_path, tiny_pair("llama", layers=1), PROMPTS_ONLY, **options).train()
    with pytest.raises(UserError, match="was made with other weights"):
        make_trainer(tmp_path, tiny_pair("llama", layers=1, seed=5), PROMPTS_ONLY, **options).train()
    with (tmp_path / "teacher_text.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="was changed after"):
        make_trainer(tmp_path, tiny_pair("llama", layers=1), PROMPTS_ONLY, **options).train()


# ------------------------------------------------------------------------------------------- replay and rising share


def some_rollouts(keep_teacher: Any = "hidden") -> list[Rollout]:
    trainer_pair = tiny_pair("llama", layers=1)
    from switchkd.records import Sampling
    from switchkd.rollout.reference import ReferenceEngine

    return ReferenceEngine(trainer_pair).generate(
        [example.prompt for example in EXAMPLES], Teacher(), Sampling(5), keep_teacher=keep_teacher
    )


def assert_same_rollouts(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        # NaN, where a policy has no threshold, is not equal to itself.
        assert str([getattr(one, name) for name in vars(one) if name != "teacher_hidden"]) == str(
            [getattr(other, name) for name in vars(other) if name != "teacher_hidden"]
        )
        assert (one.teacher_hidden is None) == (other.teacher_hidden is None)
        assert one.teacher_hidden is None or torch.equal(one.teacher_hidden, other.teacher_hidden)


def test_the_oldest_rollouts_leave_first_and_a_file_brings_all_back(tmp_path: Path) -> None:
    rollouts = [*some_rollouts(), *some_rollouts(None)]
    buffer = ReplayBuffer(12)
    buffer.add(rollouts[:8][::-1])
    assert not buffer.is_full
    assert_same_rollouts(buffer.rollouts, rollouts[:8])
    buffer.add(rollouts[8:])
    assert buffer.is_full
    assert_same_rollouts(buffer.rollouts, rollouts[4:])
    buffer.save(tmp_path)
    loaded = ReplayBuffer(12)
    loaded.load(tmp_path)
    assert_same_rollouts(loaded.rollouts, buffer.rollouts)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert loaded.draw(0.0) is loaded.rollouts[0]
    assert loaded.draw(1 - 2**-24) is loaded.rollouts[-1]


def test_a_buffer_that_is_cut_off_or_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ReplayBuffer(2).load(tmp_path)
    buffer = ReplayBuffer(8)
    buffer.add(some_rollouts())
    buffer.save(tmp_path)
    (tmp_path / FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        buffer.load(tmp_path)


@pytest.mark.parametrize("method", ["switch", "distillm"])
def test_resumed_equals_uninterrupted_with_replay(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every evaluation counts as worse.
    monkeypatch.setattr("switchkd.training.adaptive_share.MARGIN", -100.0)
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "replay_capacity": 5}
    if method == "distillm":
        options |= {**EVALUATED, "eval_steps": 2, "student_share": 0.5, "share_rise": 0.25}
        # transformers then makes callbacks that keep a state again, without their settings.
        options |= {"restore_callback_states_from_checkpoint": True}
    pair = tiny_pair("gpt2", layers=1)
    whole = make_trainer(tmp_path, pair, method=method, **options)
    whole.train()
    assert any(line.get("replayed", 0) > 0 for line in whole.state.log_history)
    if method == "distillm":
        shares = [line["student_share"] for line in whole.state.log_history if "student_share" in line]
        assert shares == [0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    resumed = make_trainer(tmp_path, pair, method=method, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]


def test_a_rising_share_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no evaluation; set eval_strategy and eval_data"):
        make_trainer(tmp_path, tiny_pair("llama", layers=1), method="distillm")
