"""Training on the teacher's likeliest ids alone, and a run whose server of rollouts goes away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.errors import Unreachable, UserError
from switchkd.methods.config import SwitchConfig
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.policies import Switch
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.training.replay import ReplayBuffer
from switchkd.training.step_loss import StepLoss
from tiny import VOCABULARY, tiny_pair
from trainers import RecordingEngine, assert_same_weights, history, make_trainer, weights


def losses(folder: Path, **options: Any) -> list[float]:
    trainer = make_trainer(folder, tiny_pair("llama"), split=(2, 2), **options)
    engine = RecordingEngine(trainer)
    trainer.train()
    rollouts = [rollout for call in engine.calls for rollout in call]
    signal = options.get("teacher_signal")
    assert rollouts
    # A student that writes alone is read by the trainer's teacher afterwards.
    asked = "method" not in options
    assert all((each.teacher_top is not None) == (asked and signal is not None) for each in rollouts)
    assert all((each.teacher_hidden is not None) == (asked and signal is None) for each in rollouts)
    return [line["loss"] for line in history(trainer) if "loss" in line]


@pytest.mark.parametrize("method", [{}, {"method": "gkd", "student_share": 0.5}], ids=["switch", "gkd"])
def test_all_ids_are_the_whole_distribution_and_fewer_are_a_lower_bound(method: dict[str, Any], tmp_path: Path) -> None:
    """With gkd half of the text is the data set's, which the trainer's own teacher reads."""
    # An f-divergence: merging ids into one event cannot raise it, and merging more of them lowers it.
    options = {**method, "divergence": "forward_kl", "max_steps": 1}
    dense = losses(tmp_path, **options)
    whole, many, few = (losses(tmp_path, teacher_signal={"top_k": k}, **options) for k in (VOCABULARY, 16, 2))
    # Log-probabilities are kept in float32, and added up in another order.
    assert whole == pytest.approx(dense, rel=1e-5)
    assert few[0] < many[0] < dense[0]


def test_what_is_kept_of_the_teacher_goes_through_the_replay(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    sampling = Sampling(max_new_tokens=5)
    rollouts = SpeculativeEngine(pair, 3).generate([[5, 6], [7, 8, 9]], Switch(), sampling, keep_teacher=4)
    buffer, again = ReplayBuffer(4), ReplayBuffer(4)
    buffer.add(rollouts)
    buffer.save(tmp_path)
    again.load(tmp_path)
    for one, other in zip(buffer.rollouts, again.rollouts, strict=True):
        assert one.token_ids == other.token_ids
        assert one.teacher_top is not None
        assert other.teacher_top is not None
        assert torch.equal(one.teacher_top.ids, other.teacher_top.ids)
        assert torch.equal(one.teacher_top.logp, other.teacher_top.logp)
        assert torch.equal(one.teacher_top.rest_logp, other.teacher_top.rest_logp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm": "here"}, "set teacher_signal"),
        ({"vllm": "here", "method": "sft"}, "no model writes text"),
        ({"teacher_signal": {"top_k": 0}}, "keep at least 1"),
        ({"teacher_signal": {"k": 4}}, "takes top_k"),
        ({"teacher_signal": {"top_k": 4}, "loss_temperature": 2.0}, "loss_temperature is 2.0"),
        ({"teacher_signal": {"top_k": 4}, "method": "sft"}, "nothing is compared"),
        ({"teacher_signal": {"top_k": 4}, "target": "extrapolated"}, "whole distributions"),
    ],
)
def test_a_signal_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SwitchConfig(output_dir="unused", **options)


def test_the_teachers_text_can_be_written_by_vllm() -> None:
    assert SwitchConfig(output_dir="unused", method="seqkd", vllm="here").plan.teacher_signal is None


class Gone:
    """An engine whose server goes away at the third call."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.calls = engine, 0

    def generate(self, prompts: Sequence[Prompt], *given: Any, **named: Any) -> list[Rollout]:
        self.calls += 1
        if self.calls == 3:
            raise Unreachable("the server does not answer")
        rollouts: list[Rollout] = self.engine.generate(prompts, *given, **named)
        return rollouts


def test_a_run_whose_server_goes_away_leaves_a_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher_signal": {"top_k": 8}, "max_steps": 5, "split": (2, 2)}
    pair = tiny_pair("llama")
    whole = make_trainer(tmp_path / "whole", pair, **options)
    whole.train()
    broken = make_trainer(tmp_path / "run", pair, **options)
    broken.engine = Gone(broken.engine)
    with pytest.raises(Unreachable, match="does not answer"):
        broken.train()
    assert broken.state.global_step == 2
    resumed = make_trainer(tmp_path / "run", pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]


def test_a_process_that_has_no_rows_left_reads_none_of_the_teachers_likeliest_ids() -> None:
    pair = tiny_pair("llama")
    plan = SwitchConfig(output_dir="unused", method="kd", teacher_signal={"top_k": 4}).plan
    filler, loss = Example(Prompt((5, 6), 0), ()), StepLoss(pair, plan, rows=4)
    for sequences in ([filler], [filler, Example(Prompt((7,), 1), (8, 9))]):
        inputs = loss.inputs(loss.scored(sequences))
        value, report = loss(pair.student, inputs, 1.0)
        assert len(report.divergence_N) == 2 * (len(sequences) - 1)
        assert (float(value.detach()) > 0) == (len(sequences) > 1)


def test_a_start_model_is_compared_in_full_beside_the_teachers_likeliest_ids(tmp_path: Path) -> None:
    options = {"method": "stable_opd", "max_steps": 2, "divergence": "forward_kl"}
    dense, kept, without = (
        losses(tmp_path, **options, **more)
        for more in ({}, {"teacher_signal": {"top_k": VOCABULARY}}, {"start_weight": 0.0})
    )
    # Log-probabilities are kept in float32, and added up in another order.
    assert kept == pytest.approx(dense, rel=1e-5)
    # At first the student is the start model, and there the weighted divergence has no gradient.
    assert dense[0] == pytest.approx(without[0], rel=1e-6)
    assert dense[1] > without[1]
