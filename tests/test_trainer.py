"""The trainer: it learns, its options do what they say, and its log says what happened."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.law import Student
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.training.trainer import SwitchTrainer
from tiny import tiny_pair
from trainers import (
    EXAMPLES,
    NEW_TOKENS,
    PROMPTS_ONLY,
    RecordingEngine,
    assert_same_weights,
    make_trainer,
    rolled_out,
    weights,
)


def test_sft_overfits_four_examples(tmp_path: Path) -> None:
    pair, examples = tiny_pair("llama"), EXAMPLES[:4]
    trainer = make_trainer(tmp_path, pair, examples, method="sft", max_steps=120, learning_rate=1e-2)
    trainer.train()
    # Four short answers fit into the weights: 0.02 nats a token is a probability of 0.98.
    assert trainer.state.log_history[-2]["loss"] < 0.02
    prompts = [example.prompt for example in examples]
    answers = ReferenceEngine(trainer.pair).generate(prompts, Student(), Sampling(NEW_TOKENS, temperature=0))
    assert [answer.token_ids for answer in answers] == [example.response_ids for example in examples]


# That every method's loss falls is in tests/test_methods_train.py; here it falls far.
@pytest.mark.parametrize("method", ["switch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kd", "gkd"))])
def test_the_divergence_falls_on_four_prompts(method: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama", scale=5.0, noise=0.5)
    options = {"max_steps": 60, "learning_rate": 3e-3, "adam_beta2": 0.95, "temperature": 0.0}
    trainer = make_trainer(tmp_path, pair, EXAMPLES[:4], method=method, **options)
    trainer.train()
    measured = [line["divergence"] for line in trainer.state.log_history if "divergence" in line]
    # Measured: 3 times less for switch, more for the others. What is written changes with the student, so not to zero.
    assert sum(measured[-5:]) < sum(measured[:5]) / 2.5


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


def test_max_steps_and_accumulation_are_counted_in_optimizer_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), split=(1, 3), max_steps=5)
    texts = rolled_out(trainer)
    assert trainer.state.global_step == 5
    # Eight rows make two steps of three rows, and an epoch's last step of two.
    assert [len(step) for step in texts] == [3, 3, 2, 3, 3]


def test_epochs_roll_the_same_prompt_out_again(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("epochs", "steps"), [(3, 6), (0.75, 2)])
def test_a_run_is_described_before_it_starts(epochs: float, steps: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), split=(2, 2), max_steps=-1, num_train_epochs=epochs)
    described = trainer.describe()
    assert f"{steps} steps x 4 sequences (100% rolled out) of up to 10 response tokens" in described
    trainer.train()
    assert trainer.state.global_step == steps
