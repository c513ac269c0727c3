"""The text of a step, without a trainer: who writes which row, and that no split of the rows changes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerState

from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, FinishReason, Prompt, Rollout
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.training.meters import Meters
from switchkd.training.step_text import TEXT_MEASURES, StepText
from tiny import EOS_ID, tiny_pair
from trainers import make_examples

EXAMPLES = make_examples(100)


class OneTokenEngine:
    """Ends every text at once, and remembers which prompts each policy got."""

    def __init__(self) -> None:
        self.prompts: dict[type[Policy], list[Prompt]] = {}

    def generate(self, prompts: Sequence[Prompt], policy: Policy, **settings: Any) -> list[Rollout]:
        self.prompts.setdefault(type(policy), []).extend(prompts)
        by_teacher, unknown = (isinstance(policy, Teacher),), (math.nan,)
        end = FinishReason.END_OF_TEXT
        return [
            Rollout(prompt, (EOS_ID,), by_teacher, (0.1,), unknown, unknown, unknown, finish_reason=end)
            for prompt in prompts
        ]


def written(
    examples: Sequence[Example], step: int, **settings: Any
) -> tuple[list[Example | Rollout], OneTokenEngine, dict[str, float]]:
    """The sequences of one step, the engine that wrote them, and what was measured."""
    args, engine, meters = SwitchConfig(output_dir="unused", **settings), OneTokenEngine(), Meters(TEXT_MEASURES)
    text = StepText(args, {"": ModelPair(tiny_pair("llama", layers=1).student)}, meters, examples)
    (made,) = text.sequences_of_steps([examples], TrainerState(global_step=step), engine, log=dict)
    return [*made.sequences], engine, meters.drain(lambda sums: sums)


def test_each_rollout_takes_the_place_of_its_example() -> None:
    sequences, engine, _ = written(EXAMPLES, 3, method="gkd", student_share=0.5)
    rolled_out = [sequence for sequence in sequences if isinstance(sequence, Rollout)]
    # 100 coins of 0.5 have a deviation of 5.
    assert abs(len(rolled_out) - 50) < 15
    for sequence, example in zip(sequences, EXAMPLES, strict=True):
        if isinstance(sequence, Rollout):
            assert sequence.prompt == Prompt(example.prompt.token_ids, example.prompt.prompt_id, sample_id=3)
        else:
            assert sequence is example
    assert engine.prompts == {Student: [rollout.prompt for rollout in rolled_out]}


def test_who_writes_depends_on_the_row_and_the_step_alone() -> None:
    settings: dict[str, Any] = {"method": "distillm2", "student_share": 0.5}
    whole, _, _ = written(EXAMPLES, 3, **settings)
    halves = [*written(EXAMPLES[50:], 3, **settings)[0], *written(EXAMPLES[:50], 3, **settings)[0]]
    # Logs hold NaN, which is not equal to itself.
    assert list(map(str, whole)) == list(map(str, [*halves[50:], *halves[:50]]))
    later, _, _ = written(EXAMPLES, 4, **settings)
    assert [type(sequence) for sequence in later] != [type(sequence) for sequence in whole]


def test_the_teacher_alone_writes_its_share_of_the_rollouts() -> None:
    sequences, engine, measured = written(EXAMPLES, 0, method="distillm2")
    assert {policy: len(prompts) for policy, prompts in engine.prompts.items()} == {
        Student: sum(not sequence.written_by_teacher[0] for sequence in sequences),
        Teacher: sum(sequence.written_by_teacher[0] for sequence in sequences),
    }
    assert abs(len(engine.prompts[Teacher]) - 50) < 15
    assert measured["teacher_share"] == len(engine.prompts[Teacher]) / 100
    assert measured["ended"] == measured["response_tokens"] == 1
