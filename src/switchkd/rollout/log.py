"""What a row has written so far, and what a policy sees of it.

Shape letters: B rows, K positions of a block, L tokens written before it, H hidden; `...` is (B,) or (B, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchkd.distributions.divergences import JensenShannon
from switchkd.distributions.draw import Draft
from switchkd.distributions.noise import Stream, uniforms
from switchkd.records import FinishReason, Prompt, Rollout, Sampling, TopLogp
from switchkd.rollout.law import Policy, Positions

# What every rollout records, whatever the policy compares and the loss takes.
_DIVERGENCE = JensenShannon()


class RolloutLog:
    """The tokens that one row has written, with what a `Rollout` records of each."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.written_by_teacher: list[bool] = []
        self.divergence: list[float] = []
        self.threshold: list[float] = []
        self.student_logp: list[float] = []
        self.teacher_logp: list[float] = []
        self.law_logp: list[float] = []
        self.teacher_part: list[float] = []
        self.margin: list[float] = []
        self.teacher_hidden: list[Tensor] = []
        self.teacher_top: list[TopLogp] = []

    @property
    def text(self) -> list[int]:
        """The ids of prompt and response."""
        return [*self.prompt.token_ids, *self.token_ids]

    def extend(self, token_ids: list[int], written_by_teacher: list[bool], *measures: list[float]) -> None:
        """Add tokens with what is measured of each.

        In order: divergence, threshold, log-probability under student, teacher and law, the teacher's part and, where it is
        asked for, the margin.
        """
        self.token_ids += token_ids
        self.written_by_teacher += written_by_teacher
        models = (self.student_logp, self.teacher_logp, self.law_logp)
        columns = (self.divergence, self.threshold, *models, self.teacher_part, self.margin)
        for column, values in zip(columns, measures, strict=False):
            column += values

    def rollout(self, eos_ids: Sequence[int], hidden_device: torch.device | str | None) -> Rollout:
        """The record of the finished row. The kept hidden states, pieces of shape (..., H), become one tensor (T, H).

        They move to `hidden_device`, or stay where they are if it is None.
        """
        ended = self.token_ids[-1] in eos_ids
        pieces = [piece.reshape(-1, piece.shape[-1]) for piece in self.teacher_hidden]
        # One copy a row. A copy for each block would wait for the device each time.
        hidden = torch.cat(pieces).to(hidden_device) if pieces else None
        return Rollout(
            prompt=self.prompt,
            token_ids=tuple(self.token_ids),
            written_by_teacher=tuple(self.written_by_teacher),
            divergence=tuple(self.divergence),
            threshold=tuple(self.threshold),
            student_logp=tuple(self.student_logp),
            teacher_logp=tuple(self.teacher_logp),
            finish_reason=FinishReason.END_OF_TEXT if ended else FinishReason.LENGTH,
            teacher_hidden=hidden,
            law_logp=tuple(self.law_logp),
            teacher_part=tuple(self.teacher_part),
            margin=tuple(self.margin),
            teacher_top=TopLogp.joined(self.teacher_top) if self.teacher_top else None,
        )


class Compared(NamedTuple):
    """A draft beside the teacher: its log-probabilities (..., V), and of shape (...) the divergence of the two models in nats, the
    coins, and the uniforms that decide whether a proposal stands.
    """

    teacher_logp: Tensor
    divergence: Tensor
    coin: Tensor
    keep: Tensor


def compare(draft: Draft, teacher_logp: Tensor) -> Compared:
    """What every rollout records of a draft (...), whatever the policy."""
    divergence = _DIVERGENCE(draft.student_logp, teacher_logp)
    return Compared(teacher_logp, divergence, *uniforms(draft.address, Stream.COIN, Stream.KEEP))


def observe(
    policy: Policy, draft: Draft, compared: Compared, logs: Sequence[RolloutLog], sampling: Sampling
) -> Positions:
    """What the policy sees of a draft (...), one position or a block of them per row of `logs`."""
    past_divergence = past_by_teacher = None
    if policy.needs_history:
        # float64 holds the record's numbers exactly, so a block sees its past as single steps saw it. Not every device has it.
        divergences = [torch.tensor(log.divergence, dtype=torch.float64) for log in logs]
        writers = [torch.tensor(log.written_by_teacher, dtype=torch.bool) for log in logs]
        past_divergence = pad_sequence(divergences, batch_first=True, padding_value=math.nan, padding_side="left")
        past_by_teacher = pad_sequence(writers, batch_first=True, padding_value=False, padding_side="left")
    position, begun = draft.address.position, [log.prompt.begun for log in logs]
    if any(begun):
        # The noise counts what is written, a policy the response, of which a part was there.
        begun_B = torch.tensor(begun, device=position.device)
        position = position + (begun_B if position.ndim == 1 else begun_B[:, None])
    return Positions(
        position=position,
        divergence=compared.divergence,
        student_logp=draft.student_logp,
        teacher_logp=compared.teacher_logp,
        coin=compared.coin,
        max_new_tokens=sampling.max_new_tokens,
        greedy=sampling.greedy,
        past_divergence=past_divergence,
        past_by_teacher=past_by_teacher,
    )
