"""`threshold: auto`: what is found is logged, kept and found again, in a resumed run as in an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import save_pair, switchkd, write_run
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.rollout.policies import Switch
from switchkd.run.callbacks import read_log
from test_calibration import share_of
from tiny import tiny_pair
from trainers import RecordingEngine, assert_same_weights, history, make_trainer, weights

CONSTANT: dict[str, Any] = {"decay": "constant", "learning_rate": 1e-2}


def auto(**settings: Any) -> dict[str, Any]:
    return {"threshold": {"name": "auto", "prompts": 6, **settings}, **CONSTANT}


def thresholds_found(trainer: Any) -> dict[int, float]:
    return {line["step"]: line["threshold"] for line in trainer.state.log_history if "threshold" in line}


def test_a_run_writes_with_the_threshold_that_it_finds(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainer = make_trainer(tmp_path, pair, **auto(teacher_share=0.3))
    engine = RecordingEngine(trainer)
    trainer.train()
    ((step, threshold),) = thresholds_found(trainer).items()
    assert step == 0
    *calibrations, _, _, _ = engine.calls
    assert {len(call) for call in calibrations} == {6}
    assert min(abs(share_of(call) - 0.3) for call in calibrations) <= 0.05
    written = [value for call in engine.calls[-3:] for rollout in call for value in rollout.threshold]
    # The engine compares in float32.
    assert written == pytest.approx([threshold] * len(written), rel=1e-6)
    (line,) = (line for line in trainer.state.log_history if "threshold" in line)
    assert line["calibrated_teacher_share"] == min(map(share_of, calibrations), key=lambda share: abs(share - 0.3))


# Calibrations are due at steps 0, 3 and 6: a checkpoint lies between two of them, and one where one is due.
@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(saved_at: int, tmp_path: Path) -> None:
    pair = tiny_pair("gpt2")
    options = {**auto(every=3, teacher_share=0.1), "max_steps": 7, "save_strategy": "steps", "save_steps": saved_at}
    whole = make_trainer(tmp_path, pair, **options)
    whole.train()
    found = thresholds_found(whole)
    assert list(found) == [0, 3, 6]
    assert len(set(found.values())) == 3
    saved = json.loads((tmp_path / f"checkpoint-{saved_at}" / "trainer_state.json").read_text())
    due = 0 if saved_at < 4 else 3
    kept = saved["stateful_callbacks"]["switchkd"]
    assert kept["auto_threshold"] == {"threshold": found[due], "step": due}
    resumed = make_trainer(tmp_path, pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]


def test_it_is_calibrated_on_texts_as_long_as_the_step_s(tmp_path: Path) -> None:
    growth = {"length_growth": {"start": 4, "steps_per_token": 100.0}}
    trainer = make_trainer(tmp_path, tiny_pair("llama"), **auto(), **growth, max_steps=1)
    engine = RecordingEngine(trainer)
    trainer.train()
    assert {max(len(rollout.token_ids) for rollout in call) for call in engine.calls} == {4}


def test_a_student_that_is_its_teacher_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = tiny_pair("llama").student
    with pytest.raises(UserError, match="20% cannot be reached"):
        make_trainer(tmp_path, ModelPair(student, student), **auto()).train()


def test_other_methods_pass_auto_by(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method="gkd", max_steps=1, **auto())
    trainer.train()
    assert not thresholds_found(trainer)


def test_a_run_file_says_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pair(tmp_path)
    path = write_run(
        tmp_path, tmp_path, threshold={"name": "auto", "teacher_share": 0.4}, max_steps=1, max_new_tokens=12
    )
    assert switchkd("train", path) == 0
    (found,) = (event for event in read_log(tmp_path / "out" / "log.jsonl") if "threshold" in event)
    assert f"0/1  threshold {found['threshold']:.3g}" in capsys.readouterr().out
    assert torch.isfinite(Switch(found["threshold"]).thresholds(torch.arange(3), 12)).all()
