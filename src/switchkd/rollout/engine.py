"""What a rollout engine is: prompts and a policy in, finished rollouts out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.distributions.divergences import jensen_shannon
from switchkd.distributions.noise import Address, Stream, uniform
from switchkd.errors import UserError
from switchkd.models.heads import base_of
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout, Sampling
from switchkd.rollout.policies import Policy, Positions

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


def as_prompts(
    prompts: Sequence[PromptLike], tokenizer: PreTrainedTokenizerBase | None, vocabulary: int
) -> list[Prompt]:
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
    if keep_teacher and teacher is None:
        raise UserError(f"keep_teacher is {keep_teacher!r}, but the pair has no teacher; load one, or leave it out")
    if sampling.no_repeat_ngram_size and (policy.needs_teacher or keep_teacher):
        raise UserError(
            f"no_repeat_ngram_size is {sampling.no_repeat_ngram_size}; it is for evaluating a student alone, "
            f"not where a teacher runs (policy {type(policy).__name__}); set it to 0"
        )


def check_models(pair: ModelPair) -> None:
    """Raises UserError for a model that cannot continue a text token by token through a cache that is handed to it."""
    for role, model in (("student", pair.student), ("teacher", pair.teacher)):
        if model is None:
            continue
        inner = base_of(model)
        if getattr(inner.config, "is_encoder_decoder", False):
            reason = "is an encoder-decoder, and a rollout continues one text"
        elif "past_key_values" not in inspect.signature(inner.forward).parameters:
            # Mamba and RWKV name it otherwise; given under the wrong name it would be ignored without a word.
            reason = "takes no past_key_values, so every token would be a guess from the one before it alone"
        else:
            continue
        raise UserError(f"the {role}, {type(inner).__name__}, {reason}; take a decoder-only model with attention")


def check_numbers(student_logp: Tensor, divergence: Tensor | None) -> None:
    """Raises UserError where what was written has no number: NaN would go on as token 0 and train nothing to see."""
    for who, value in (("student", student_logp), ("teacher", divergence)):
        if value is not None and bool(value.isnan().any()):
            raise UserError(
                f"the {who}'s probabilities are NaN: its weights have diverged or its precision does not hold; go back to an "
                f"earlier checkpoint with a lower learning rate, or load it in float32"
            )


class RolloutLog:
    """What one row has written so far."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.written_by_teacher: list[bool] = []
        self.divergence: list[float] = []
        self.threshold: list[float] = []
        self.student_logp: list[float] = []
        self.teacher_logp: list[float] = []
        self.teacher_hidden: list[Tensor] = []

    def finished(self, eos_ids: Sequence[int]) -> Rollout:
        """The record of the row; its kept hidden states, pieces of shape (..., H), are put together."""
        ended = self.token_ids[-1] in eos_ids
        hidden_size = self.teacher_hidden[0].shape[-1] if self.teacher_hidden else 0
        return Rollout(
            prompt=self.prompt,
            token_ids=tuple(self.token_ids),
            written_by_teacher=tuple(self.written_by_teacher),
            divergence=tuple(self.divergence),
            threshold=tuple(self.threshold),
            student_logp=tuple(self.student_logp),
            teacher_logp=tuple(self.teacher_logp),
            finish_reason=FinishReason.END_OF_TEXT if ended else FinishReason.LENGTH,
            teacher_hidden=torch.cat([piece.reshape(-1, hidden_size) for piece in self.teacher_hidden])
            if self.teacher_hidden
            else None,
        )


def seen_by(
    policy: Policy,
    proposal: Tensor,
    student_logp: Tensor,
    teacher_logp: Tensor,
    address: Address,
    logs: Sequence[RolloutLog],
    max_new_tokens: int,
) -> Positions:
    """What the policy sees at the addresses, one position or a block of them for each row of `logs`."""
    past_divergence = past_by_teacher = None
    if policy.needs_history:
        device = proposal.device
        divergences = [torch.tensor(log.divergence, dtype=torch.float64, device=device) for log in logs]
        writers = [torch.tensor(log.written_by_teacher, dtype=torch.bool, device=device) for log in logs]
        past_divergence = pad_sequence(divergences, batch_first=True, padding_value=math.nan, padding_side="left")
        past_by_teacher = pad_sequence(writers, batch_first=True, padding_value=False, padding_side="left")
    return Positions(
        position=address.position,
        divergence=jensen_shannon(student_logp, teacher_logp),
        student_logp=student_logp,
        teacher_logp=teacher_logp,
        proposal=proposal,
        coin=uniform(address, Stream.COIN),
        max_new_tokens=max_new_tokens,
        past_divergence=past_divergence,
        past_by_teacher=past_by_teacher,
    )
