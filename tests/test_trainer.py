"""The trainer: what it minimises, and that neither the batch split, nor a restart, nor the checkpoint's disk changes it."""

from __future__ import annotations

import copy
import errno
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from switchkd.data.collate import collate
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.policies import Student
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.training.trainer import SwitchTrainer, last_complete_checkpoint
from tiny import EOS_ID, PAD_ID, VOCABULARY, tiny_pair, tiny_tokenizer

NEW_TOKENS = 10
# Clocks differ between equal runs.
TIMINGS = ("per_second", "runtime")


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Prompts of 1 to 6 tokens with responses of 1 to 9 that end in the end-of-text token."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    return [Example(Prompt(tokens(6), index), (*tokens(8), EOS_ID)) for index in range(count)]


EXAMPLES = make_examples(8)
PROMPTS_ONLY = [Example(example.prompt, ()) for example in EXAMPLES]
TEXT_ROWS = [{"prompt": f"one two w{20 + row}", "completion": f"sun w{30 + row} red"} for row in range(4)]


def make_trainer(
    folder: Path,
    pair: ModelPair,
    train_dataset: Any = EXAMPLES,
    *,
    split: tuple[int, int] = (4, 1),
    callbacks: list[TrainerCallback] | None = None,
    eval_dataset: Any = None,
    engine: Any = None,
    peft_config: Any = None,
    teacher_model: Any = None,
    **options: Any,
) -> SwitchTrainer:
    """A trainer over a copy of the pair's student; `split` is rows a micro-batch, and micro-batches an optimiser step."""
    rows, accumulation = split
    quiet: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True, "max_new_tokens": NEW_TOKENS, "max_steps": 3}
    return SwitchTrainer(
        model=copy.deepcopy(pair.student),
        teacher_model=pair.teacher if teacher_model is None else teacher_model,
        processing_class=pair.tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        engine=engine,
        peft_config=peft_config,
        args=SwitchConfig(
            output_dir=str(folder),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            **{**quiet, "learning_rate": 1e-3, **options},
        ),
    )


class Gradients(TrainerCallback):
    """The gradients that each optimiser step gets."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


class RecordingEngine:
    """A trainer's engine, and all that it gave."""

    def __init__(self, trainer: SwitchTrainer) -> None:
        self.engine = trainer.engine
        self.calls: list[list[Rollout]] = []
        trainer.engine = self

    def generate(self, prompts: Sequence[Prompt], **named: Any) -> list[Rollout]:
        self.calls.append(self.engine.generate(prompts, **named))
        return self.calls[-1]


def rolled_out(trainer: SwitchTrainer) -> list[list[tuple[int, ...]]]:
    """The token ids of each step's rollouts while the trainer trains."""
    engine = RecordingEngine(trainer)
    trainer.train()
    return [[rollout.token_ids for rollout in call] for call in engine.calls]


def history(trainer: SwitchTrainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not any(timing in key for timing in TIMINGS)}
        for line in trainer.state.log_history
    ]


def weights(trainer: SwitchTrainer) -> dict[str, Tensor]:
    return trainer.pair.student.state_dict()


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


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


def loss_on(trainer: SwitchTrainer, batch: Any) -> Tensor:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, {"batch": batch})


# -------------------------------------------------------------------------------------------------------- it learns


def test_sft_overfits_four_examples(tmp_path: Path) -> None:
    pair, examples = tiny_pair("llama"), EXAMPLES[:4]
    trainer = make_trainer(tmp_path, pair, examples, method="sft", max_steps=120, learning_rate=1e-2)
    trainer.train()
    # Four short answers fit into the weights: 0.02 nats a token is a probability of 0.98.
    assert trainer.state.log_history[-2]["loss"] < 0.02
    prompts = [example.prompt for example in examples]
    answers = ReferenceEngine(trainer.pair).generate(prompts, Student(), Sampling(NEW_TOKENS, temperature=0))
    assert [answer.token_ids for answer in answers] == [example.response_ids for example in examples]


@pytest.mark.parametrize("method", ["kd", "gkd", "switch"])
def test_the_divergence_falls_on_four_prompts(method: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama", scale=5.0, noise=0.5)
    options = {"max_steps": 60, "learning_rate": 3e-3, "adam_beta2": 0.95, "temperature": 0.0}
    trainer = make_trainer(tmp_path, pair, EXAMPLES[:4], method=method, **options)
    trainer.train()
    measured = [line["divergence"] for line in trainer.state.log_history if "divergence" in line]
    # Measured: 3 times less for switch, more for the others. What is written changes with the student, so not to zero.
    assert sum(measured[-5:]) < sum(measured[:5]) / 2.5


# ------------------------------------------------------------------------------------------- equal runs, cut-off runs


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


def test_a_checkpoint_whose_state_was_cut_off_is_no_complete_one(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (4, '{"epoch": 1, "glo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(("method", "fits"), [("switch", False), ("kd", True)])
def test_sequences_that_do_not_fit_are_refused_before_training(method: str, fits: bool, tmp_path: Path) -> None:
    pair = tiny_pair("gpt2", max_position_embeddings=24)
    if fits:
        make_trainer(tmp_path, pair, method=method, max_new_tokens=40)
    else:
        with pytest.raises(UserError, match="knows 24 positions"):
            make_trainer(tmp_path, pair, method=method, max_new_tokens=40)


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


# -------------------------------------------------------------------------------------------- what the loss is over


@pytest.mark.parametrize(
    "method",
    [
        {"method": "sft"},
        {"method": "switch"},
        {"method": "gkd", "student_share": 0.5, "cross_entropy_weight": 0.3},
        {"method": "switch", "student_share": 0.5, "train_on": "student", "student_token_weight": 0.5},
    ],
    ids=lambda method: method.get("train_on", method["method"]),
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
    ("options", "weight_of"),
    [
        ({"train_on": "student"}, {False: 1, True: 0}),
        ({"train_on": "teacher"}, {False: 0, True: 1}),
        ({"train_on": "teacher", "teacher_token_weight": 0.5}, {False: 0, True: 0.5}),
        ({"student_token_weight": 0.25, "teacher_token_weight": 2.0}, {False: 0.25, True: 2}),
    ],
)
@pytest.mark.parametrize("student_share", [0.5, 1.0])
def test_the_loss_is_over_the_writers_that_train_and_over_all_data_text(
    options: dict[str, Any], weight_of: dict[bool, float], student_share: float, tmp_path: Path
) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    trainer = make_trainer(tmp_path, pair, split=(4, 2), max_steps=1, student_share=student_share, **options)
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
        counted += sum(weight != 0 for weight in of_each)
    # transformers adds the losses of a step up in float32.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(summed) / counted, rel=1e-6)


def test_a_step_in_which_nothing_trains_is_a_loss_of_0_and_changes_nothing(tmp_path: Path) -> None:
    """At ln 2 nats the teacher never writes."""
    pair = tiny_pair("llama")
    trainer = make_trainer(tmp_path, pair, train_on="teacher", threshold=math.log(2), decay="constant", max_steps=2)
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
        for options in ({}, {"train_on": "student"}, {"train_on": "teacher", "teacher_token_weight": 0.5})
    ]
    assert values[0] == values[1] == values[2] > 0.1


@pytest.fixture(scope="module")
def sft_trainer(tmp_path_factory: pytest.TempPathFactory) -> SwitchTrainer:
    """Never trained: for the loss of batches."""
    return make_trainer(tmp_path_factory.mktemp("sft"), tiny_pair("llama", dtype=torch.float64), method="sft")


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_editing_a_counted_token_changes_the_loss_and_editing_padding_does_not(
    data: st.DataObject, sft_trainer: SwitchTrainer
) -> None:
    examples = make_examples(3, seed=data.draw(st.integers(0, 1000)))
    batch = collate(examples, PAD_ID)
    before = loss_on(sft_trainer, batch)
    row, column = data.draw(st.sampled_from(torch.ones_like(batch.input_ids_BT).nonzero().tolist()))
    shift = data.draw(st.integers(1, VOCABULARY - 1))
    batch.input_ids_BT[row, column] = (batch.input_ids_BT[row, column] + shift) % VOCABULARY
    after = loss_on(sft_trainer, batch)
    if batch.attention_mask_BT[row, column]:
        # A counted token is a target; a prompt token is not, but every later prediction reads it.
        assert before != after
    else:
        assert before == after


def test_only_response_tokens_are_targets(sft_trainer: SwitchTrainer) -> None:
    """The gradient arrives at the last prompt token and on, and at nothing before."""
    student = sft_trainer.pair.student
    example = Example(Prompt((5, 6, 7, 8), 0), (9, 10, EOS_ID))
    reached: list[Tensor] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state.register_hook(reached.append)

    handle = student.get_decoder().register_forward_hook(watch)
    sft_trainer.compute_loss(student, {"batch": collate([example], PAD_ID)}).backward()
    handle.remove()
    student.zero_grad()
    assert (reached[0][0].abs().sum(-1) > 0).tolist() == [False, False, False, True, True, True, False]


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_a_micro_batch_without_counted_positions_adds_exactly_nothing(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method=method)
    loss = trainer.compute_loss(
        trainer.model, {"batch": collate(trainer._scored(PROMPTS_ONLY), PAD_ID)}, num_items_in_batch=5
    )
    loss.backward()
    assert loss.item() == 0
    # Zeros, not None: data parallelism waits for every parameter.
    assert all(p.grad is not None and not p.grad.any() for p in trainer.pair.student.parameters())


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


# ---------------------------------------------------------------------------------------------- the trainer's options


def test_gradient_checkpointing_changes_nothing_and_rollouts_keep_their_cache(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    plain = make_trainer(tmp_path, pair)
    plain.train()
    checkpointed = make_trainer(tmp_path, pair, activation_checkpointing=True)
    widths: dict[bool, list[int]] = {True: [], False: []}
    layer = checkpointed.pair.student.get_decoder().layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda layer, inputs: widths[layer.training].append(inputs[0].shape[1]))
    checkpointed.train()
    handle.remove()
    assert checkpointed.pair.student.is_gradient_checkpointing
    # While it writes, no forward is wider than the longest prompt: what went before is in the cache.
    assert max(widths[False]) <= max(len(example.prompt.token_ids) for example in EXAMPLES) < NEW_TOKENS
    # While it trains, each of three steps runs the layer twice, over prompts with responses.
    assert len(widths[True]) == 3 * 2
    assert min(widths[True]) > NEW_TOKENS
    assert_same_weights(weights(plain), weights(checkpointed))


def test_max_steps_and_accumulation_are_counted_in_optimiser_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), split=(1, 3), max_steps=5)
    texts = rolled_out(trainer)
    assert trainer.state.global_step == 5
    # Eight rows make two steps of three rows, and an epoch's last step of two.
    assert [len(step) for step in texts] == [3, 3, 2, 3, 3]


def test_epochs_roll_the_same_prompt_out_anew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), split=(8, 1), max_steps=2, learning_rate=0.0)
    engine = RecordingEngine(trainer)
    trainer.train()
    first, second = ({r.prompt.prompt_id: r.token_ids for r in call} for call in engine.calls)
    assert first.keys() == second.keys() == set(range(8))
    assert first != second
    assert [{r.prompt.sample_id for r in call} for call in engine.calls] == [{0}, {1}]


@pytest.mark.parametrize("method", ["kd", "switch"])
def test_the_teacher_never_changes(method: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    assert pair.teacher is not None
    before = copy.deepcopy(pair.teacher.state_dict())
    trainer = make_trainer(tmp_path, pair, method=method)
    trainer.train()
    assert_same_weights(before, pair.teacher.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in pair.teacher.parameters())
    assert not pair.teacher.training
    assert any(not torch.equal(value, pair.student.state_dict()[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("method", ["sft", "switch"])
def test_an_adapter_is_all_that_trains(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pair = tiny_pair("llama")
    options = {
        "method": method,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "peft_config": peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
    }
    trainer = make_trainer(tmp_path, pair, **options)
    before = copy.deepcopy(weights(trainer))
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert {path.name for path in (tmp_path / "checkpoint-4").glob("*.safetensors")} == {"adapter_model.safetensors"}
    resumed = make_trainer(tmp_path, pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(trainer), weights(resumed))


# ------------------------------------------------------------------------------------------------- the data it takes


def refused(folder: Path, pair: ModelPair, rows: Any, **options: Any) -> str:
    """What the trainer says against the data; fails where it ran a model first."""
    handles = [
        model.register_forward_pre_hook(lambda module, inputs: pytest.fail("a model ran before the data was checked"))
        for model in (pair.student, pair.teacher)
        if model is not None
    ]
    with pytest.raises(UserError) as caught:
        make_trainer(folder, pair, rows, **options)
    for handle in handles:
        handle.remove()
    return str(caught.value)


@pytest.mark.parametrize(
    "method", [{"method": "switch"}, {"method": "gkd", "student_share": 1.0}], ids=lambda method: method["method"]
)
@pytest.mark.parametrize("rows", [[{"prompt": row["prompt"]} for row in TEXT_ROWS], PROMPTS_ONLY], ids=["text", "ids"])
def test_prompts_alone_are_enough_where_all_text_is_rolled_out(
    method: dict[str, Any], rows: list[Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama", tokenizer=tiny_tokenizer()), rows, **method)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    "method",
    [{"method": "sft"}, {"method": "kd"}, {"method": "gkd", "student_share": 0.5}],
    ids=lambda method: method["method"],
)
@pytest.mark.parametrize("rows", [[{"prompt": row["prompt"]} for row in TEXT_ROWS], PROMPTS_ONLY], ids=["text", "ids"])
def test_prompts_alone_are_refused_before_any_forward_where_text_is_trained_on(
    method: dict[str, Any], rows: list[Any], tmp_path: Path
) -> None:
    message = refused(tmp_path, tiny_pair("llama", tokenizer=tiny_tokenizer()), rows, **method)
    assert "no response" in message


def test_evaluation_data_needs_responses_whatever_the_method(tmp_path: Path) -> None:
    assert "no response" in refused(tmp_path, tiny_pair("llama"), EXAMPLES, eval_dataset=PROMPTS_ONLY, method="switch")


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    student = tiny_pair("llama").student
    with pytest.raises(UserError, match="tokenizer"):
        SwitchTrainer(student, args=SwitchConfig(output_dir=str(tmp_path), method="sft"), train_dataset=TEXT_ROWS)


def test_several_evaluation_sets_are_evaluated_each(tmp_path: Path) -> None:
    sets = {"short": EXAMPLES[:3], "rest": EXAMPLES[3:]}
    trainer = make_trainer(tmp_path, tiny_pair("llama"), eval_dataset=sets, method="kd")
    each = trainer.evaluate()
    for name, examples in sets.items():
        alone = make_trainer(tmp_path, tiny_pair("llama"), eval_dataset=examples, method="kd").evaluate()
        assert each[f"eval_{name}_loss"] == alone["eval_loss"]


def test_models_and_data_go_by_name(tmp_path: Path) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    assert pair.teacher is not None
    assert pair.tokenizer is not None
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in TEXT_ROWS))
    named = SwitchTrainer(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        args=make_trainer(tmp_path, pair, TEXT_ROWS).args,
        train_dataset=str(data),
    )
    named.train()
    given = make_trainer(tmp_path, pair, TEXT_ROWS)
    given.train()
    assert_same_weights(weights(named), weights(given))


def test_a_named_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    assert pair.teacher is not None
    pair.teacher.save_pretrained(tmp_path)
    tiny_tokenizer(words=("three", "two", "one")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizers of student and teacher differ"):
        SwitchTrainer(pair.student, str(tmp_path), processing_class=pair.tokenizer, train_dataset=TEXT_ROWS)


def test_sft_needs_no_teacher_and_every_other_method_says_that_it_does(tmp_path: Path) -> None:
    student_alone = ModelPair(tiny_pair("llama").student)
    with_teacher = make_trainer(tmp_path, tiny_pair("llama"), method="sft")
    without = make_trainer(tmp_path, student_alone, method="sft")
    without.train()
    with_teacher.train()
    assert_same_weights(weights(without), weights(with_teacher))
    for method in ("kd", "gkd", "switch"):
        with pytest.raises(UserError, match="but none was given; set teacher_model"):
            make_trainer(tmp_path, student_alone, method=method)


class NoEngine:
    def generate(self, *arguments: Any, **named: Any) -> list[Rollout]:
        pytest.fail("rolled out")


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_methods_on_given_text_roll_nothing_out(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method=method, engine=NoEngine())
    trainer.train()
    assert "response_tokens" not in trainer.state.log_history[0]


def test_the_student_share_is_a_coin_for_each_sequence(tmp_path: Path) -> None:
    pair, examples = tiny_pair("llama", layers=1), make_examples(200)
    chosen = {}
    for split in ((40, 1), (8, 5)):
        trainer = make_trainer(
            tmp_path, pair, examples, split=split, method="gkd", student_share=0.3, max_new_tokens=1, max_steps=10
        )
        engine = RecordingEngine(trainer)
        trainer.train()
        chosen[split] = [[rollout.prompt.prompt_id for rollout in call] for call in engine.calls]
    first, second = chosen.values()
    assert first == second
    # 400 coins of 0.3 in all have a deviation of 9.2.
    assert abs(sum(map(len, first)) - 120) < 3 * 9.2
    # Each row comes up once in five steps; a new coin in the second epoch picks others.
    assert {row for call in first[:5] for row in call} != {row for call in first[5:] for row in call}


# ------------------------------------------------------------------------------------------------------ what it says


def _forwards_of(model: PreTrainedModel | None) -> list[tuple[int, ...]]:
    """The shape of the ids of each forward that the model will run."""
    assert model is not None
    shapes: list[tuple[int, ...]] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, positional, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_was_kept_of_the_teacher_stands_for_a_fresh_forward(family: str, tmp_path: Path) -> None:
    class Forgets(RecordingEngine):
        def generate(self, prompts: Sequence[Prompt], **named: Any) -> list[Rollout]:
            return [replace(each, teacher_hidden=None) for each in super().generate(prompts, **named)]

    losses, teacher_forwards = [], []
    for kind in (RecordingEngine, Forgets):
        pair = tiny_pair(family)
        trainer = make_trainer(tmp_path, pair, PROMPTS_ONLY, max_steps=1, threshold=0.3)
        engine = kind(trainer)
        forwards = _forwards_of(pair.teacher)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert isinstance(engine.engine, SpeculativeEngine)
        assert engine.engine.metrics.teacher_forwards > 0
        teacher_forwards.append(len(forwards) - engine.engine.metrics.teacher_forwards)
    # The rollout's forwards are over blocks, the fresh one over the whole text: float32 roundings of two layers.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert teacher_forwards == [0, 1]


def test_the_teacher_reads_only_what_it_has_not_read_yet(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainer = make_trainer(tmp_path, pair, method="switch", student_share=0.5, split=(4, 2), max_steps=1)
    engine = RecordingEngine(trainer)
    forwards = _forwards_of(pair.teacher)
    trainer.train()
    assert isinstance(engine.engine, SpeculativeEngine)
    read = forwards[engine.engine.metrics.teacher_forwards :]
    rolled_out = len(engine.calls[0])
    assert 0 < rolled_out < 8
    assert sum(rows for rows, _ in read) == 8 - rolled_out


def test_a_step_logs_what_was_written_and_learned(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainer = make_trainer(
        tmp_path, pair, split=(2, 2), max_steps=2, max_new_tokens=80, threshold=0.33, decay="constant", measure_every=2
    )
    engine = RecordingEngine(trainer)
    trainer.train()
    for line, rollouts in zip(trainer.state.log_history, engine.calls, strict=False):
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        written = sum(sum(rollout.written_by_teacher) for rollout in rollouts)
        assert line["teacher_share"] == written / tokens
        assert line["response_tokens"] == tokens / 4
        assert line["ended"] == sum(rollout.finish_reason == "end_of_text" for rollout in rollouts) / 4
        assert line["rollout_divergence"] == pytest.approx(sum(sum(r.divergence) for r in rollouts) / tokens)
        assert line["rollout_tokens_per_second"] > 0
        assert line["train_tokens_per_second"] > 0
        # Float32 sums; the loss is the divergence where no cross-entropy is added.
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)
        counts = {
            name: sum(start <= position < end for r in rollouts for position in range(len(r.token_ids)))
            for name, start, end in (("0-31", 0, 32), ("32-63", 32, 64), ("64-127", 64, 128), ("128-255", 128, 256))
        }
        buckets = {name: line[f"divergence/{name}"] for name, count in counts.items() if count}
        writers = {"divergence/student_tokens", "divergence/teacher_tokens"}
        logged = {key for key in line if key.startswith("divergence/")}
        assert {f"divergence/{name}" for name in buckets} | writers == logged
        by_writer = line["divergence/teacher_tokens"] * written + line["divergence/student_tokens"] * (tokens - written)
        assert by_writer / tokens == pytest.approx(line["divergence"], rel=1e-5)
        mean = sum(value * counts[name] for name, value in buckets.items()) / tokens
        assert mean == pytest.approx(line["divergence"], rel=1e-5)
    assert any("divergence/64-127" in line for line in trainer.state.log_history)
    measured = ["student_entropy" in line for line in trainer.state.log_history if "loss" in line]
    assert measured == [True, False]


def test_sft_logs_cross_entropy_and_no_divergence(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method="sft", max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["cross_entropy"] == pytest.approx(line["loss"], rel=1e-5)
    assert not any("divergence" in key or "rollout" in key for key in line)


def test_a_log_line_is_the_mean_over_all_its_steps(tmp_path: Path) -> None:
    every, third = (make_trainer(tmp_path, tiny_pair("llama"), method="kd", logging_steps=steps) for steps in (1, 3))
    every.train()
    third.train()
    lines = every.state.log_history[:3]
    tokens = [sum(len(EXAMPLES[row].response_ids) for row in rows) for rows in batches_of(every)]
    mean = sum(line["divergence"] * count for line, count in zip(lines, tokens, strict=True)) / sum(tokens)
    assert third.state.log_history[0]["divergence"] == pytest.approx(mean, rel=1e-6)


def batches_of(trainer: SwitchTrainer) -> list[list[int]]:
    """The row numbers of each of the first three steps, one micro-batch a step, over epochs."""
    loader = trainer.get_train_dataloader()
    found: list[list[int]] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [[example.prompt.prompt_id for example in inputs["examples"]] for inputs in loader]
    return found[:3]


def test_a_run_is_described_before_it_starts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), split=(2, 2), max_steps=-1, num_train_epochs=3)
    described = trainer.describe()
    assert "6 steps x 4 sequences (100% rolled out) of up to 10 response tokens" in described
    trainer.train()
    assert trainer.state.global_step == 6
