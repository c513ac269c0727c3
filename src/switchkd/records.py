"""The frozen records that one stage hands to the next.

Shape letters used in the whole package: B rows, T positions, V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import torch

from switchkd.errors import UserError


class FinishReason(StrEnum):
    """Why a rollout ended."""

    END_OF_TEXT = "end_of_text"
    LENGTH = "length"


@dataclass(frozen=True)
class Prompt:
    """What a rollout continues, and the address of its random draws.

    `prompt_id` and `sample_id` name the noise: the same ids under the same seed give the same rollout, whatever else is in the
    batch. A plain list of prompts is numbered by position, with sample 0.

    The last `begun` tokens are the beginning of a response, taken from another text. They count as part of `max_new_tokens`,
    and where `trains_beginning` they are trained on, like the data set's text.

    `teacher` is the name of the teacher that takes part and is learned from, where a run has several; it moves no noise.
    """

    token_ids: tuple[int, ...]
    prompt_id: int
    sample_id: int = 0
    begun: int = 0
    trains_beginning: bool = False
    teacher: str = ""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; it acts on both models' distributions alike, before policy and draw.

    `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 keep every token. `no_repeat_ngram_size` n > 0 forbids any n-gram
    to occur twice in prompt and response; it is there to compare with published tables, and only where the student
    writes alone.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it has to be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; use 0 for greedy decoding or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be in (0, 1], where 1 keeps every token")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; use 0 to keep every token or a positive number")
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; use 0 to allow repeats")

    @property
    def greedy(self) -> bool:
        """True where decoding is argmax."""
        return self.temperature == 0


@dataclass(frozen=True, eq=False)
class TopLogp:
    """A model's likeliest K ids at each of T positions: `ids` (T, K) int64, and their log-probabilities in nats at temperature 1,
    `logp` (T, K) float32; `rest_logp` (T,) float32 is that of all other ids together, -inf where there are none.
    """

    ids: torch.Tensor
    logp: torch.Tensor
    rest_logp: torch.Tensor

    def at(self, index: slice) -> TopLogp:
        """Those of some of the positions."""
        return TopLogp(self.ids[index], self.logp[index], self.rest_logp[index])

    def to(self, device: torch.device | str) -> TopLogp:
        """The same on another device."""
        return TopLogp(self.ids.to(device), self.logp.to(device), self.rest_logp.to(device))

    @staticmethod
    def joined(parts: Sequence[TopLogp]) -> TopLogp:
        """Those of several texts, one after another."""
        columns = ([getattr(part, each.name) for part in parts] for each in fields(TopLogp))
        return TopLogp(*map(torch.cat, columns))


@dataclass(frozen=True)
class Rollout:
    """One finished response with, for every token of it, who wrote it and how far apart the two models were.

    All per-token fields have the length of `token_ids` (T, the end-of-text token included). `divergence` is the
    Jensen-Shannon divergence in nats between the two next-token distributions after temperature, top-p and top-k;
    `threshold` is what the policy compared it with (NaN where the policy has none); `student_logp` and
    `teacher_logp` are each model's log-probability of the written token in nats, -inf where the model excludes it.
    Where no teacher ran, `divergence` and `teacher_logp` are NaN. `teacher_hidden` is the teacher's last hidden state that
    predicted each token, shape (T, H), where the engine was asked to keep it, on the device that the engine left it on.

    `law_logp` is the log-probability in nats with which the token was written, that of its writer or of a blend;
    `teacher_part`, 0 to 1, is the probability that the teacher is its writer, given the token: 0 or 1 but for blends. `margin`
    is what, in nats, the teacher's favorite among the student's likeliest tokens has over the next of them, where the engine
    was asked for it. All three may be left out. `teacher_top` is what the teacher found likeliest in each token's place, where
    the engine was asked for that, on the CPU.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    written_by_teacher: tuple[bool, ...]
    divergence: tuple[float, ...]
    threshold: tuple[float, ...]
    student_logp: tuple[float, ...]
    teacher_logp: tuple[float, ...]
    finish_reason: FinishReason
    teacher_hidden: torch.Tensor | None = None
    law_logp: tuple[float, ...] = ()
    teacher_part: tuple[float, ...] = ()
    margin: tuple[float, ...] = ()
    teacher_top: TopLogp | None = None

    @property
    def teacher_tokens(self) -> float:
        """How many tokens the teacher wrote; of a blend, in the mean over what the coins might have said."""
        return sum(self.teacher_part or self.written_by_teacher)

    @property
    def teacher_share(self) -> float:
        """The share of tokens that the teacher wrote, 0 to 1."""
        return self.teacher_tokens / len(self.token_ids)

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout with what it keeps of the teacher on another device: "cpu" to store it or to send it."""
        return self if self.teacher_hidden is None else replace(self, teacher_hidden=self.teacher_hidden.to(device))


def teacher_share_of(rollouts: Sequence[Rollout]) -> float:
    """The share of all tokens of these rollouts that the teacher wrote, 0 to 1; NaN where there are none."""
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return sum(rollout.teacher_tokens for rollout in rollouts) / tokens if tokens else math.nan


@dataclass(frozen=True)
class Example:
    """A prompt with the response that the data set gives for it (empty where there is none); both as token ids.

    `teacher_hidden` and `teacher_top` as in a `Rollout`, once the teacher has been asked.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    teacher_hidden: torch.Tensor | None = None
    teacher_top: TopLogp | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts with their responses as tensors, padded on the right.

    `input_ids_BT` (long); `attention_mask_BT` (long, 1 where there is a token); `response_mask_BT` (bool) is True at the
    response tokens, the end-of-text token included: these N positions are counted, and the token at t is predicted at t - 1;
    `rolled_out_BT` (bool) is True at those of rollouts, not of a data set's text, and `written_by_teacher_BT` (bool) where a
    rollout says so; `student_logp_BT`, `teacher_logp_BT` and `law_logp_BT` (float64, nats) are the token's log-probability
    under each model and under the law that wrote it, when it was written, and `margin_BT` (float64, nats) the teacher's margin
    there, 0 where there is no rollout and NaN where it was not recorded; they stay on the CPU. `beginning_BT` (bool) is True
    at the response tokens of a rollout's row that it began with, from another text. `teachers` names each row's teacher.
    `teacher_hidden` are the teachers' last hidden states that predicted each counted token, row after row, where every sequence
    brought them: by name, each teacher's at its own rows' tokens (those of a run's only teacher under ""); `teacher_top_N` is what
    the row's teacher found likeliest there, likewise.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    response_mask_BT: torch.Tensor
    rolled_out_BT: torch.Tensor
    written_by_teacher_BT: torch.Tensor
    teacher_hidden: Mapping[str, torch.Tensor] | None = None
    student_logp_BT: torch.Tensor | None = None
    teacher_logp_BT: torch.Tensor | None = None
    law_logp_BT: torch.Tensor | None = None
    margin_BT: torch.Tensor | None = None
    teacher_top_N: TopLogp | None = None
    teachers: tuple[str, ...] = ()

    @property
    def beginning_BT(self) -> torch.Tensor:  # noqa: N802
        """See above."""
        begun_BT = self.response_mask_BT & ~self.rolled_out_BT
        return begun_BT & self.rolled_out_BT.any(dim=1, keepdim=True)

    @property
    def response_tokens(self) -> int:
        """The number of counted positions, N."""
        return int(self.response_mask_BT.sum())

    def counted_of(self, teacher: str) -> torch.Tensor:
        """Which of the counted positions (N,), bool on the CPU, are in rows of a teacher."""
        rows_B = torch.tensor([name == teacher for name in self.teachers])
        return rows_B[:, None].expand(self.response_mask_BT.shape)[self.response_mask_BT.cpu()]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device, but for the log-probabilities: not every device has float64."""
        names = [field.name for field in fields(self) if not field.name.endswith(("_logp_BT", "margin_BT"))]
        held = {name: value for name in names if isinstance(value := getattr(self, name), torch.Tensor | TopLogp)}
        moved: dict[str, Any] = {name: each.to(device) for name, each in held.items()}
        hidden = self.teacher_hidden and {name: states.to(device) for name, states in self.teacher_hidden.items()}
        return replace(self, **moved, teacher_hidden=hidden)
