"""Steps whose text is written at once: by whom, up to where, and that runs stay equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState, TrainingArguments

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.records import Example
from switchkd.training.loaded_steps import loaded_steps, steps_at_once
from tiny import tiny_pair
from trainers import (
    EXAMPLES,
    RecordingEngine,
    assert_same_weights,
    history,
    make_examples,
    make_trainer,
    rolled_out,
    weights,
)

# Of 10 rows in micro-batches of 2, two a step, an epoch has two whole steps and one of 2 rows.
TEN_ROWS, SPLIT = make_examples(10), (2, 2)


class StopAfterOne(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("method", [{"method": "switch"}, {"method": "gkd", "student_share": 0.5}])
def test_where_the_student_stands_still_nothing_changes(method: dict[str, Any], tmp_path: Path) -> None:
    """So each text has the address, the place and the step that it has where each step is written by itself."""
    runs = [
        make_trainer(
            tmp_path,
            tiny_pair("llama"),
            TEN_ROWS,
            split=SPLIT,
            max_steps=7,
            learning_rate=0.0,
            rollout_steps=steps,
            **method,
        )
        for steps in (1, 3)
    ]
    alone, together = (rolled_out(run) for run in runs)
    # Epochs end after steps 3 and 6.
    assert len(together) <= 3
    assert [*chain(*together)] == [*chain(*alone)]
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in runs]
    # The teacher reads the texts in other batches, which moves float32 by its rounding, 6e-8 of a number, a few times over.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_student_of_the_first_step_writes_for_all(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "imitkd", "max_steps": 4, "learning_rate": 0.05}
    alone, together = (
        rolled_out(make_trainer(tmp_path, tiny_pair("llama"), rollout_steps=steps, **options)) for steps in (1, 2)
    )
    assert [len(texts) for texts in together] == [8, 8]
    # The first step's student is the same; the second's has learned in the run that writes each step by itself.
    assert together[0][:4] == alone[0]
    assert together[0][4:] != alone[1]


# GPT-2 has dropout, so the generator's state counts too. Four steps at once are cut at 3 and 6, where checkpoints are,
# in the middle of an epoch.
@pytest.mark.parametrize("saved_at", [3, 6])
@pytest.mark.parametrize("extra", [{}, {"replay_capacity": 6, "student_share": 1.0}], ids=["fresh", "replay"])
def test_resumed_equals_uninterrupted_bit_for_bit(extra: dict[str, Any], saved_at: int, tmp_path: Path) -> None:
    pair = tiny_pair("gpt2")
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "split": SPLIT, "rollout_steps": 4, **extra}
    whole = make_trainer(tmp_path, pair, make_examples(40), **options)
    texts = rolled_out(whole)
    resumed = make_trainer(tmp_path, pair, make_examples(40), **options)
    engine = RecordingEngine(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert [[rollout.token_ids for rollout in call] for call in engine.calls] == texts[-len(engine.calls) :]
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]


def test_a_calibration_that_is_due_between_comes_where_text_is_written_next(tmp_path: Path) -> None:
    auto = {"name": "auto", "prompts": 4, "every": 3}
    trainer = make_trainer(tmp_path, tiny_pair("llama"), max_steps=8, rollout_steps=2, threshold=auto)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "threshold" in line] == [0, 4, 6]


def test_text_that_waits_when_training_ends_is_not_taken_for_that_of_another_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), max_steps=4, rollout_steps=4, callbacks=[StopAfterOne()])
    engine = RecordingEngine(trainer)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 1
    assert len(engine.calls) == 2


def test_the_newest_rollouts_are_those_of_the_step(tmp_path: Path) -> None:
    seen: list[set[int]] = []
    trainer = make_trainer(tmp_path, tiny_pair("llama"), max_steps=3, rollout_steps=3)
    trainer.tell_written(
        lambda written: seen.append({each.prompt.sample_id + 1 - written.step for each in written.rollouts})
    )
    trainer.train()
    assert seen == [{0}] * 3
    assert {rollout.prompt.sample_id for rollout in trainer.newest_rollouts} == {2}


@pytest.mark.parametrize(
    ("step", "most", "given", "expected"),
    [
        (0, 100, {}, 4),
        (6, 100, {}, 2),
        (4, 6, {}, 2),
        (4, 100, {"save_strategy": "steps", "save_steps": 5}, 1),
        (5, 100, {"save_strategy": "steps", "save_steps": 7, "eval_strategy": "steps", "eval_steps": 6}, 1),
        # Not due: no checkpoint is written, and the epoch's end ends the steps by itself.
        (4, 100, {"save_strategy": "epoch", "save_steps": 5}, 4),
    ],
)
def test_up_to_where_steps_are_written(
    step: int, most: int, given: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **{"save_strategy": "no", **given})
    state = TrainerState(
        global_step=step, max_steps=most, save_steps=args.save_steps, eval_steps=args.eval_steps or 500
    )
    assert steps_at_once(4, state, args) == expected


def test_a_loader_that_ends_gives_what_it_has() -> None:
    """The rows that fill up the last batch are left out, and a batch of nothing else has one that counts nowhere."""
    batches: Iterator[list[Example]] = iter([EXAMPLES[:2], EXAMPLES[2:4], EXAMPLES[4:6]])
    whole, rest = loaded_steps(batches, 3, 2, lambda batch: [] if batch[0] is EXAMPLES[4] else batch)
    assert (whole.rows, whole.fillers) == (EXAMPLES[:4], ())
    assert (rest.rows, [filler.response_ids for filler in rest.fillers]) == ([], [()])
    assert not loaded_steps(batches, 3, 2, lambda batch: batch)


def test_no_step_at_once_is_refused() -> None:
    with pytest.raises(UserError, match="rollout_steps is 0; it has to be at least 1"):
        SwitchConfig(output_dir="unused", rollout_steps=0)
