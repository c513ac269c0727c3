"""Sums over the student's answers to an evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from switchkd.errors import UserError
from switchkd.evaluation.generate import answer_of
from switchkd.evaluation.measures import AnswerScore
from switchkd.records import Rollout


class ScoredAnswers:
    """The sums of some scores over the answers that one process writes; `references` are by prompt id."""

    def __init__(
        self,
        scores: Sequence[AnswerScore] = (),
        references: Mapping[int, tuple[str, ...]] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.scores = scores
        self._references = references or {}
        self._tokenizer = tokenizer
        # Each score's sum, then the number of answers.
        self._sums = torch.zeros(len(scores) + 1, dtype=torch.float64)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Add the scores of some answers. Raises UserError where a function of the user's fails, or there is no text."""
        if not self.scores:
            return
        if self._tokenizer is None:
            raise UserError("eval_scores compares text, but there is no tokenizer; give processing_class")
        for rollout in rollouts:
            prompt = str(self._tokenizer.decode(list(rollout.prompt.token_ids), clean_up_tokenization_spaces=False))
            answer = answer_of(rollout, self._tokenizer, seed=0).text
            references = self._references.get(rollout.prompt.prompt_id, ())
            scored = [score(prompt, answer, references) for score in self.scores]
            self._sums += torch.tensor([*scored, 1.0], dtype=torch.float64)

    def means(self, gathered: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean scores by name; `gathered` puts the values of all processes into one tensor, along its first axis."""
        *sums, answers = gathered(self._sums[None]).sum(dim=0).tolist()
        return {score.name: total / (answers or 1) for score, total in zip(self.scores, sums, strict=True)}
