"""What the trainer minimizes: over which tokens, and that no split of the step changes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from switchkd.loss.weights import ByWriter
from switchkd.models.pair import ModelPair
from switchkd.records import Example
from tiny import EOS_ID, PAD_ID, tiny_pair, tiny_tokenizer
from trainers import (
    EXAMPLES,
    Gradients,
    RecordingEngine,
    assert_same_weights,
    make_examples,
    make_trainer,
    rolled_out,
    weights,
)


def dense_forward_kl(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def dense_cross_entropy(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return -student.gather(-1, token_ids[:, None])[:, 0]


def dense_loss(pair: ModelPair, examples: Sequence[Example], position_loss: Callable[..., Tensor]) -> Tensor:
    """The mean over response tokens."""
    return dense_losses(pair, examples, position_loss).mean()


def dense_losses(pair: ModelPair, examples: Sequence[Example], position_loss: Callable[..., Tensor]) -> Tensor:
    """Each response token's, one row at a time, without padding, masks or chunks: logits at t - 1 predict t."""
    parts = []
    for example in examples:
        ids = torch.tensor([[*example.prompt.token_ids, *example.response_ids]])
        both = [model(ids).logits[0].log_softmax(-1) for model in (pair.student, pair.teacher)]
        for position in range(len(example.prompt.token_ids), ids.shape[1]):
            student, teacher = (logp[position - 1 : position] for logp in both)
            parts.append(position_loss(student, teacher, ids[0, position : position + 1])[0])
    return torch.stack(parts)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "sft"},
        {"method": "switch"},
        {"method": "gkd", "student_share": 0.5, "cross_entropy_weight": 0.3},
        {"method": "switch", "student_share": 0.5, "weight": ByWriter(0.5, 0.0)},
    ],
    ids=lambda method: "weighted" if "weight" in method else method["method"],
)
def test_the_gradient_does_not_depend_on_how_the_step_is_split(method: dict[str, Any], tmp_path: Path) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    # Several ids end a text, so that responses end at different lengths and a mean of means would show.
    pair.student.generation_config.eos_token_id = list(range(1, 12))
    found = {}
    for split in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path, pair, split=split, callbacks=[gradients], max_steps=1, max_grad_norm=0.0, **method
        )
        texts = rolled_out(trainer)
        found[split] = gradients.steps[0], texts, trainer.state.log_history[0]["loss"]
    expected, expected_texts, expected_loss = found.pop((8, 1))
    written = expected_texts[0] if expected_texts else [example.response_ids for example in EXAMPLES]
    assert len({len(token_ids) for token_ids in written}) > 2
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 1
    for gradient, texts, loss in found.values():
        assert texts == expected_texts
        assert gradient.keys() == expected.keys()
        for name in gradient:
            # Float64 sums in another order: some tens of roundings of 2e-16 each on gradients of up to 10.
            torch.testing.assert_close(gradient[name], expected[name], rtol=0, atol=1e-12)
        # transformers adds the losses of a step up in float32.
        assert loss == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("method", "position_loss"),
    [("sft", dense_cross_entropy), ("kd", dense_forward_kl), ("switch", dense_forward_kl)],
)
def test_eval_loss_is_the_plain_mean_over_response_tokens(
    method: str, position_loss: Callable[..., Tensor], family: str, tmp_path: Path
) -> None:
    pair, examples = tiny_pair(family, dtype=torch.float64), make_examples(7, seed=3)
    with torch.no_grad():
        expected = float(dense_loss(pair, examples, position_loss))
    assert expected > 0.1
    for rows in (1, 3, 7, 16):
        trainer = make_trainer(tmp_path, pair, eval_dataset=examples, method=method, per_device_eval_batch_size=rows)
        # Float64 sums in another order, of up to 100 nats in all.
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-12)


def test_the_first_training_loss_is_that_of_the_rollouts_at_the_step(tmp_path: Path) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    trainer = make_trainer(tmp_path, pair, split=(3, 2), max_steps=1)
    engine = RecordingEngine(trainer)
    trainer.train()
    written = [Example(rollout.prompt, rollout.token_ids) for rollout in engine.calls[0]]
    with torch.no_grad():
        expected = float(dense_loss(pair, written, dense_forward_kl))
    # transformers adds the losses of a step up in float32.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "weight_of"),
    [
        (ByWriter(teacher=0.0), {False: 1, True: 0}),
        (ByWriter(student=0.0), {False: 0, True: 1}),
        (ByWriter(0.0, 0.5), {False: 0, True: 0.5}),
        (ByWriter(0.25, 2.0), {False: 0.25, True: 2}),
    ],
)
@pytest.mark.parametrize("student_share", [0.5, 1.0])
def test_the_loss_is_over_the_writers_that_train_and_over_all_data_text(
    weight: ByWriter, weight_of: dict[bool, float], student_share: float, tmp_path: Path
) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    trainer = make_trainer(tmp_path, pair, split=(4, 2), max_steps=1, student_share=student_share, weight=weight)
    engine = RecordingEngine(trainer)
    trainer.train()
    rolled_out_ids = {rollout.prompt.prompt_id: rollout for rollout in engine.calls[0]}
    assert {True, False} == {by for rollout in rolled_out_ids.values() for by in rollout.written_by_teacher}
    assert (len(rolled_out_ids) < 8) == (student_share < 1)
    summed, counted = torch.zeros(()), 0
    for example in EXAMPLES:
        rollout = rolled_out_ids.get(example.prompt.prompt_id)
        text = example if rollout is None else Example(rollout.prompt, rollout.token_ids)
        of_each = (
            [1.0] * len(text.response_ids) if rollout is None else [weight_of[by] for by in rollout.written_by_teacher]
        )
        with torch.no_grad():
            losses = dense_losses(pair, [text], dense_forward_kl)
        summed = summed + (losses * torch.tensor(of_each, dtype=torch.float64)).sum()
        counted += sum(each != 0 for each in of_each)
    # transformers adds the losses of a step up in float32.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(summed) / counted, rel=1e-6)


def test_the_student_learns_no_cross_entropy_from_its_own_text(tmp_path: Path) -> None:
    """Seen in other tools, and here: nine tenths of the loss was that of the student's own samples."""
    pair = tiny_pair("llama")
    # All is rolled out but what a coin in a million decides; of all there would be nothing for the weight to act on.
    runs = [
        make_trainer(tmp_path, pair, method="gkd", student_share=1 - 1e-6, max_steps=2, **options)
        for options in ({}, {"cross_entropy_weight": 1.0}, {"cross_entropy_weight": 1.0, "cross_entropy_on": "all"})
    ]
    for run in runs:
        run.train()
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in runs]
    assert losses[0] == losses[1]
    assert_same_weights(weights(runs[0]), weights(runs[1]))
    assert losses[2][0] > losses[0][0] + 0.5


@pytest.mark.parametrize("on", ["data", "data+teacher", "all"])
def test_the_cross_entropy_falls_on_the_text_that_it_is_for(on: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    options = {"student_share": 0.5, "cross_entropy_weight": 0.7, "cross_entropy_on": on}
    trainer = make_trainer(tmp_path, pair, split=(4, 2), max_steps=1, **options)
    engine = RecordingEngine(trainer)
    trainer.train()
    written = {rollout.prompt.prompt_id: rollout for rollout in engine.calls[0]}
    assert {True, False} == {by for rollout in written.values() for by in rollout.written_by_teacher}
    expected = []
    for example in EXAMPLES:
        rollout = written.get(example.prompt.prompt_id)
        text = example if rollout is None else Example(rollout.prompt, rollout.token_ids)
        by_teacher = (
            torch.zeros(len(text.response_ids)) if rollout is None else torch.tensor(rollout.written_by_teacher)
        )
        factor = torch.ones(1) if rollout is None or on == "all" else by_teacher.double() * (on == "data+teacher")
        with torch.no_grad():
            compared, named = (dense_losses(pair, [text], loss) for loss in (dense_forward_kl, dense_cross_entropy))
        expected.append(compared + 0.7 * factor * named)
    # transformers adds the losses of a step up in float32.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-6)


def test_a_step_in_which_nothing_trains_is_a_loss_of_0_and_changes_nothing(tmp_path: Path) -> None:
    """At ln 2 nats the teacher never writes."""
    pair = tiny_pair("llama")
    trainer = make_trainer(
        tmp_path, pair, weight=ByWriter(student=0.0), threshold=math.log(2), decay="constant", max_steps=2
    )
    before = copy.deepcopy(weights(trainer))
    trainer.train()
    losses = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in losses] == [0, 0]
    assert all(line["teacher_share"] == 0 for line in losses)
    assert_same_weights(weights(trainer), before)


def test_evaluation_is_over_all_responses_whoever_trains(tmp_path: Path) -> None:
    pair, examples = tiny_pair("llama", dtype=torch.float64), make_examples(5, seed=3)
    values = [
        make_trainer(tmp_path, pair, eval_dataset=examples, **options).evaluate()["eval_loss"]
        for options in ({}, {"weight": ByWriter(teacher=0.0)}, {"weight": ByWriter(0.0, 0.5)})
    ]
    assert values[0] == values[1] == values[2] > 0.1


@pytest.mark.parametrize("method", ["kd", "switch"])
def test_padding_with_the_end_of_text_token_changes_nothing(method: str, tmp_path: Path) -> None:
    trained = []
    for pad_is_eos in (False, True):
        pair = tiny_pair("llama", tokenizer=tiny_tokenizer(pad_is_eos=pad_is_eos))
        trainer = make_trainer(tmp_path, pair, method=method)
        assert trainer.pair.pad_id == (EOS_ID if pad_is_eos else PAD_ID)
        trainer.train()
        trained.append(trainer)
    assert_same_weights(weights(trained[0]), weights(trained[1]))


def test_the_loss_temperature_has_no_effect_on_rollouts(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainers = [make_trainer(tmp_path, pair, loss_temperature=value, max_steps=1) for value in (1.0, 3.0)]
    first, second = map(rolled_out, trainers)
    assert first == second
    assert trainers[0].state.log_history[0]["loss"] != trainers[1].state.log_history[0]["loss"]


def test_the_sampling_temperature_has_no_effect_on_the_loss_of_given_text(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainers = [make_trainer(tmp_path, pair, method="kd", temperature=value, top_p=value) for value in (1.0, 0.3)]
    for trainer in trainers:
        trainer.train()
    assert_same_weights(weights(trainers[0]), weights(trainers[1]))
