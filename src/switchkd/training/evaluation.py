"""Sums over an evaluation set: the loss, and the scores of the student's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.evaluation.generate import answer_of
from switchkd.evaluation.measures import AnswerScore
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Rollout, Sampling
from switchkd.rollout.engine import Engine, KeepTeacher
from switchkd.rollout.law import Student

# The sample that evaluations draw: no training step and no calibration does.
_EVALUATION = -(1 << 33)


def answers_to(
    examples: Sequence[Example], engine: Engine, sampling: Sampling, seed: int, keep_teacher: KeepTeacher = None
) -> list[Rollout]:
    """What the student writes after the prompts; the draws are the same in each evaluation."""
    prompts = [replace(example.prompt, sample_id=_EVALUATION) for example in examples]
    return engine.generate(prompts, policy=Student(), sampling=sampling, seed=seed, keep_teacher=keep_teacher)


class EvaluationSums:
    """What one evaluation adds up over the batches of a process. `rows` is the length of the whole set."""

    def __init__(
        self, scores: Sequence[AnswerScore] = (), references: Mapping[int, tuple[str, ...]] | None = None, rows: int = 0
    ) -> None:
        self.rows = rows
        self._scores = scores
        self._references = references or {}
        # Of the loss, then of each score: the sum, and over how many tokens or answers.
        self._sums = torch.zeros(1 + len(scores), 2, dtype=torch.float64)

    def add_loss(self, total: float, tokens: float) -> None:
        """Add a batch's loss, in nats, and its trained tokens."""
        self._sums[0] += torch.tensor([total, tokens], dtype=torch.float64)

    def add_answers(self, rollouts: Sequence[Rollout], pair: ModelPair, seed: int) -> None:
        """Add the scores of some answers. Raises UserError where a function of the user's fails, or there is no text."""
        if pair.tokenizer is None:
            raise UserError("eval_scores compares text, but there is no tokenizer; give processing_class")
        for rollout in rollouts:
            prompt = str(pair.tokenizer.decode(list(rollout.prompt.token_ids), clean_up_tokenization_spaces=False))
            answer = answer_of(rollout, pair.tokenizer, seed).text
            references = self._references.get(rollout.prompt.prompt_id, ())
            for place, score in enumerate(self._scores, start=1):
                self._sums[place] += torch.tensor([score(prompt, answer, references), 1.0], dtype=torch.float64)

    def means(self, gathered: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Loss (nats a token) and scores over all processes, by name; `gathered` puts the values of these into one tensor."""
        of_processes = gathered(self._sums[None]).sum(dim=0)
        names = ["loss", *(score.name for score in self._scores)]
        return {name: total / (count or 1) for name, (total, count) in zip(names, of_processes.tolist(), strict=True)}
