"""Trainers of tiny pairs, and what tests look at while they train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout
from switchkd.training.trainer import SwitchTrainer
from tiny import EOS_ID, VOCABULARY

NEW_TOKENS = 10
# Clocks differ between equal runs.
TIMINGS = ("per_second", "runtime", "training_seconds")


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
    """A trainer over a copy of the pair's student; `split` is rows a micro-batch, and micro-batches an optimizer step."""
    rows, accumulation = split
    quiet: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True, "max_new_tokens": NEW_TOKENS, "max_steps": 3}
    quiet["save_total_limit"] = None
    # A threshold of one's own spares a calibration; one that is part of a policy stands there.
    quiet |= {} if "policy" in options else {"threshold": 0.3}
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
    """The gradients that each optimizer step gets."""

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
