"""Answers of a student alone, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from switchkd.data.collate import micro_batches
from switchkd.records import Example, FinishReason, Rollout, Sampling
from switchkd.rollout.policies import Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.rollout.engine import Engine, Progress


@dataclass(frozen=True)
class Answer:
    """What the student wrote: the text without the end-of-text token, the number of tokens with it, why it ended."""

    prompt_id: int
    seed: int
    text: str
    tokens: int
    finish_reason: FinishReason


def _ignore(_finished: int) -> None:
    pass


def counting_from(before: int, on_progress: Progress) -> Progress:
    """Return `on_progress` for a part of the work, told of the whole: `before` are already finished."""
    return lambda finished: on_progress(before + finished)


def generate_answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int,
    on_progress: Progress = _ignore,
) -> list[Answer]:
    """Return the student's answers to the prompts of the examples, in their order, for one seed after the other.

    Prompts of similar length are generated together; `on_progress` is told how many answers there are so far.
    """
    groups = micro_batches([len(example.prompt.token_ids) for example in examples], batch_size)
    answers: dict[tuple[int, int], Answer] = {}
    for seed_number, seed in enumerate(seeds):
        for indices in groups:
            rollouts = engine.generate(
                [examples[index].prompt for index in indices],
                policy=Student(),
                sampling=sampling,
                seed=seed,
                on_progress=counting_from(len(answers), on_progress),
            )
            for index, rollout in zip(indices, rollouts, strict=True):
                answers[seed_number, index] = _answer(rollout, tokenizer, seed)
            on_progress(len(answers))
    return [answers[address] for address in sorted(answers)]


def _answer(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, seed: int) -> Answer:
    ended = rollout.finish_reason is FinishReason.END_OF_TEXT
    token_ids = list(rollout.token_ids[:-1] if ended else rollout.token_ids)
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Answer(rollout.prompt.prompt_id, seed, text, len(rollout.token_ids), rollout.finish_reason)


def progress_bar(shown: bool) -> ProgressBar:
    """Return a progress bar over answers with the time that is left, to be used in a `with`; silent unless `shown`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return ProgressBar(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True), disable=not shown
    )
