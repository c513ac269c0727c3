"""What a rollout engine is: prompts and a policy in, finished rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.errors import UserError
from switchkd.policies import Policy
from switchkd.records import Prompt, Rollout, Sampling

PromptLike = str | Sequence[int] | Prompt
Progress = Callable[[int], None]
KeepTeacher = Literal["hidden"] | None


class Engine(Protocol):
    """Makes rollouts. All engines give the same tokens for the same prompts, policy, sampling and seed."""

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = ...,
        seed: int = ...,
        keep_teacher: KeepTeacher = ...,
        on_progress: Progress | None = ...,
    ) -> list[Rollout]:
        """One rollout for each prompt, in the order of the prompts.

        `keep_teacher="hidden"` keeps the teacher's last hidden state for every token: T x H numbers a rollout, in the
        teacher's dtype, on the CPU. `on_progress` is told after each step how many rollouts are finished.
        """


def as_prompts(prompts: Sequence[PromptLike], tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[Prompt]:
    """The prompts as records, those that have no address numbered by position.

    Raises UserError for an empty prompt, for an id outside the shared vocabulary, and for text without a tokenizer.
    """
    records = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UserError(f"prompt {index} is text, but the pair has no tokenizer; give token ids or a tokenizer")
            prompt = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        record = prompt if isinstance(prompt, Prompt) else Prompt(tuple(prompt), prompt_id=index)
        if not record.token_ids:
            raise UserError(f"prompt {index} is empty; a model needs at least one token to continue")
        if not 0 <= min(record.token_ids) <= max(record.token_ids) < vocabulary:
            worst = max(record.token_ids, key=lambda token: abs(token - vocabulary / 2))
            raise UserError(f"prompt {index} holds token id {worst}, outside the shared vocabulary of {vocabulary} ids")
        records.append(record)
    return records


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows that end together, both (B, T) int64; padding is marked by length, never by its id."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def ban_repeated_ngrams(logits_BV: Tensor, sequences: Sequence[Sequence[int]], size: int) -> Tensor:
    """The logits with -inf where a token would repeat an n-gram of `size` that the row already holds."""
    if size == 0:
        return logits_BV
    logits_BV = logits_BV.clone()
    for row, ids in enumerate(sequences):
        context = tuple(ids[len(ids) - size + 1 :])
        starts = range(len(ids) - size + 1)
        banned = [ids[start + size - 1] for start in starts if tuple(ids[start : start + size - 1]) == context]
        logits_BV[row, banned] = -torch.inf
    return logits_BV


def check_call(policy: Policy, sampling: Sampling, teacher: PreTrainedModel | None, keep_teacher: KeepTeacher) -> None:
    """Raises UserError where the settings of a `generate` call contradict each other."""
    if policy.needs_teacher and teacher is None:
        raise UserError(f"the policy {type(policy).__name__} needs a teacher, but the pair has none; load one")
    if keep_teacher and not policy.needs_teacher:
        raise UserError(
            f"keep_teacher is {keep_teacher!r}, but under the policy {type(policy).__name__} no teacher runs; leave it out"
        )
    if sampling.no_repeat_ngram_size and policy.needs_teacher:
        raise UserError(
            f"no_repeat_ngram_size is {sampling.no_repeat_ngram_size}; it is for evaluating a student alone, "
            f"not for the policy {type(policy).__name__}; set it to 0"
        )


@contextmanager
def generating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Evaluation mode without gradients, each model's own mode restored after it.

    Also what keeps the key/value cache under gradient checkpointing, which acts on models in training mode only.
    """
    present = [model for model in models if model is not None]
    modes = [model.training for model in present]
    try:
        for model in present:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(present, modes, strict=True):
            model.train(mode)
