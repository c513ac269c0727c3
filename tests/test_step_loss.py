"""The loss of a micro-batch, without a trainer: which tokens are targets, what weighs, and what is asked of the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchkd.distributions.shaping import top_logp
from switchkd.loss.weights import ByWriter
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Sampling, TopLogp
from switchkd.rollout.blends import Mix
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.training import step_loss
from switchkd.training.step_loss import StepLoss
from tiny import EOS_ID, VOCABULARY, tiny_pair
from trainers import EXAMPLES, PROMPTS_ONLY, make_examples


def loss_of(method: str, pair: ModelPair, **settings: Any) -> StepLoss:
    plan = SwitchConfig(output_dir="unused", method=method, **settings).plan
    return StepLoss(pair, plan, rows=4)


@pytest.fixture(scope="module")
def sft() -> StepLoss:
    """Never trained: for the loss of batches."""
    return loss_of("sft", tiny_pair("llama", dtype=torch.float64))


@given(data=st.data())
def test_editing_a_counted_token_changes_the_loss_and_editing_padding_does_not(
    data: st.DataObject, sft: StepLoss
) -> None:
    inputs = sft.inputs(make_examples(3, seed=data.draw(st.integers(0, 1000))))
    batch, student = inputs["batch"], sft.pair.student
    with torch.no_grad():
        before, _ = sft(student, inputs, 1)
        row, column = data.draw(st.sampled_from(torch.ones_like(batch.input_ids_BT).nonzero().tolist()))
        shift = data.draw(st.integers(1, VOCABULARY - 1))
        batch.input_ids_BT[row, column] = (batch.input_ids_BT[row, column] + shift) % VOCABULARY
        after, _ = sft(student, inputs, 1)
    if batch.attention_mask_BT[row, column]:
        # A counted token is a target; a prompt token is not, but every later prediction reads it.
        assert before != after
    else:
        assert before == after


def test_the_teachers_likeliest_ids_are_found_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    loss = loss_of("kd", pair, teacher_signal={"top_k": 3})
    whole = loss.scored(make_examples(3))
    read: list[int] = []
    found = top_logp

    def noted(logits: Tensor, top_k: int) -> TopLogp:
        read.append(len(logits))
        return found(logits, top_k)

    monkeypatch.setattr("switchkd.training.step_loss.top_logp", noted)
    monkeypatch.setattr("switchkd.training.step_loss.numbers_at_once", lambda device: 2 * VOCABULARY)
    pieces = loss.scored(make_examples(3))
    assert set(read) <= {1, 2}
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one.teacher_top.ids, other.teacher_top.ids)
        # Products of another number of rows, in float64, kept in float32.
        torch.testing.assert_close(one.teacher_top.logp, other.teacher_top.logp, rtol=1e-6, atol=1e-6)


def test_only_response_tokens_are_targets(sft: StepLoss) -> None:
    """The gradient arrives at the last prompt token and on, and at nothing before."""
    student = sft.pair.student
    example = Example(Prompt((5, 6, 7, 8), 0), (9, 10, EOS_ID))
    reached: list[Tensor] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state.register_hook(reached.append)

    handle = student.get_decoder().register_forward_hook(watch)
    sft(student, sft.inputs([example]), 3)[0].backward()
    handle.remove()
    student.zero_grad()
    assert (reached[0][0].abs().sum(-1) > 0).tolist() == [False, False, False, True, True, True, False]


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_a_micro_batch_without_counted_positions_adds_exactly_nothing(method: str) -> None:
    pair = tiny_pair("llama")
    loss_of_batch = loss_of(method, pair)
    inputs = loss_of_batch.inputs(loss_of_batch.scored(PROMPTS_ONLY))
    assert inputs["denominator"] == 0
    loss, _ = loss_of_batch(pair.student, inputs, 5)
    loss.backward()
    assert loss.item() == 0
    # Zeros, not None: data parallelism waits for every parameter.
    assert all(p.grad is not None and not p.grad.any() for p in pair.student.parameters())


def test_a_batch_that_the_teacher_has_not_read_is_refused() -> None:
    kd = loss_of("kd", tiny_pair("llama"))
    with pytest.raises(ValueError, match="needs a teacher signal"):
        kd(kd.pair.student, kd.inputs(EXAMPLES), 1)


def test_tokens_of_weight_0_are_not_trained_on() -> None:
    pair = tiny_pair("llama")
    rollouts = ReferenceEngine(pair).generate([example.prompt for example in EXAMPLES], Switch(), Sampling(6))
    teacher_tokens = sum(sum(rollout.written_by_teacher) for rollout in rollouts)
    data_tokens = len(EXAMPLES[0].response_ids)
    inputs = loss_of("switch", pair, weight=ByWriter(student=0.0)).inputs([*rollouts, EXAMPLES[0]])
    assert 0 < inputs["denominator"] == teacher_tokens + data_tokens


def test_importance_is_computed_once_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, calls = tiny_pair("llama"), []
    compute = step_loss.importance_and_returns
    monkeypatch.setattr(step_loss, "importance_and_returns", lambda *given: calls.append(given) or compute(*given))
    minillm = loss_of("minillm", pair)
    rollouts = ReferenceEngine(pair).generate(
        [example.prompt for example in EXAMPLES], Mix(0.2), Sampling(6), keep_teacher="hidden"
    )
    minillm(pair.student, minillm.inputs(rollouts), 1)
    assert len(calls) == 1
