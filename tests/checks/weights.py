"""Texts whose counted tokens are known one by one, and a weight against its definition on batches of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from switchkd.data.collate import collate
from switchkd.records import Batch, Example, FinishReason, Prompt, Rollout
from tiny import PAD_ID

WeightFunction = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Text:
    """A text by the writers of its counted tokens: s, t, and d for the data set's, or at the start of a rollout.

    The other lists have a value for each counted token.
    """

    writers: str
    student: list[float] = field(default_factory=list)
    teacher: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    prompt_tokens: int = 3

    def sequence(self, row: int) -> Example | Rollout:
        """The record of it."""
        prompt, count = tuple(range(5, 5 + self.prompt_tokens)), len(self.writers)
        ids = tuple(range(20, 20 + count))
        begun = count - len(self.writers.lstrip("d"))
        if begun == count:
            return Example(Prompt(prompt, row), ids)
        unknown = (math.nan,) * (count - begun)
        return Rollout(
            Prompt(prompt + ids[:begun], row, begun=begun, trains_beginning=True),
            ids[begun:],
            tuple(writer == "t" for writer in self.writers[begun:]),
            unknown,
            unknown,
            tuple(self.student[begun:]),
            tuple(self.teacher[begun:]),
            finish_reason=FinishReason.LENGTH,
            margin=tuple(self.margins[begun:]),
        )


def text(writers: str, *, seed: int = 0, prompt_tokens: int = 3, margins: Sequence[float] | None = None) -> Text:
    """With random log-probabilities, some of them equal; and margins, by default random ones."""
    draw = random.Random(seed)
    student = [draw.uniform(-6, -0.1) for _ in writers]
    teacher = [own if draw.random() < 0.2 else draw.uniform(-6, -0.1) for own in student]
    found = [draw.uniform(0, 3) for _ in writers] if margins is None else list(margins)
    return Text(writers, student, teacher, found, prompt_tokens)


DROP = [2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 0.1, 0.2, 0.0, 0.1, 0.15, 0.1]
# Lengths and prompts that pad at both ends of a response, texts of the data set, and a rollout that began with one.
BATCHES = {
    "one": [text("ststs")],
    "lengths": [text("sstst", seed=1), text("s", seed=2, prompt_tokens=6), text("ttssssst", seed=3, prompt_tokens=1)],
    "data": [text("ddd", seed=4), text("sts", seed=5), text("dddddd", seed=6, prompt_tokens=1)],
    "begun": [text("ddstss", seed=7), text("sss", seed=8)],
    "agreeing": [Text("sts", [-1.0] * 3, [-1.0] * 3, [1.0] * 3), text("st", seed=9)],
    "drops": [
        text("s" * 12, seed=10, margins=DROP),
        text("ddd" + "s" * 12, seed=11, margins=[9.0, 0.0, 0.0, *DROP]),
        text("s" * 12, seed=12, margins=DROP[::-1]),
        text("s" * 9, seed=13, margins=DROP[1:10]),
        text("d" * 12, seed=14, margins=DROP),
    ],
}


def batch_of(texts: Sequence[Text]) -> Batch:
    return collate([each.sequence(row) for row, each in enumerate(texts)], PAD_ID)


def check_weight(weight: WeightFunction, of_text: Callable[[Text], list[float]]) -> None:
    """The definition's values at the counted tokens of every batch."""
    for name, texts in BATCHES.items():
        batch = batch_of(texts)
        found = weight(batch)
        assert found.shape == batch.response_mask_BT.shape
        expected = [value for each in texts for value in of_text(each)]
        # float64: roundings of some ten terms.
        assert found[batch.response_mask_BT].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-13), name
