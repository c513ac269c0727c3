"""Answers of a student alone, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from switchkd.records import Example, FinishReason, Rollout, Sampling
from switchkd.rollout.engine import Engine, Progress
from switchkd.rollout.law import Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the student wrote: the text without the end-of-text token, the number of tokens with it, why it ended."""

    prompt_id: int
    seed: int
    text: str
    tokens: int
    finish_reason: FinishReason


def generate_answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    sampling: Sampling,
    seed: int,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """The student's answers to the prompts of the examples, in their order.

    `on_progress` is told the number of finished answers.
    """
    # All prompts in one call: the engine itself fills the place of a finished row, and its `max_rows` bounds memory.
    prompts = [example.prompt for example in examples]
    rollouts = engine.generate(prompts, Student(), sampling, seed, on_progress=on_progress)
    return [answer_of(rollout, tokenizer, seed) for rollout in rollouts]


def answer_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, seed: int) -> Answer:
    """A rollout as text."""
    # The model's end token need not be a special token of the tokenizer, and would then be decoded as text.
    ended = rollout.finish_reason is FinishReason.END_OF_TEXT
    token_ids = list(rollout.token_ids[:-1] if ended else rollout.token_ids)
    # Not tidied up: the scores are for what the model wrote, blanks included.
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Answer(rollout.prompt.prompt_id, seed, text, len(rollout.token_ids), rollout.finish_reason)
