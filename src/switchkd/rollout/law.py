"""What a policy is: the law of the next token, from both models' distributions at a prefix.

A token is drawn by the maximal coupling of that law to the student's proposal (distributions/draw.py), so rollouts are exact for
any law, and a draft stands as often as it can.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# The kinds of device that have float64; the others ask the CPU.
WITH_FLOAT64 = ("cpu", "cuda")


def in_float64(values: Tensor) -> Tensor:
    """The values in float64, where they are if that device has the type, or else on the CPU."""
    return (values if values.device.type in WITH_FLOAT64 else values.cpu()).double()


@dataclass(frozen=True)
class Positions:
    """What a policy sees. All tensors share one shape: (B,) for one position of each row, or (B, T) for a block.

    `position` counts the response's tokens from 0, those that it began with included, and `max_new_tokens` bounds it;
    `divergence` is the Jensen-Shannon divergence in nats; `student_logp` and `teacher_logp` have one more dimension, V; `coin` is
    uniform in (0, 1), independent of every token; `greedy` is True where the likeliest token is taken and none is drawn.

    Only a policy that `needs_history` sees the row's past: `past_divergence` (float64) and `past_by_teacher`, both (B, L),
    on the CPU, padded on the left with NaN and False where a row has written fewer than L tokens.
    """

    position: Tensor
    divergence: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    coin: Tensor
    max_new_tokens: int
    greedy: bool = False
    past_divergence: Tensor | None = None
    past_by_teacher: Tensor | None = None


@dataclass(frozen=True)
class Blend:
    """A law that is neither model's: log-probabilities (..., V) in nats, normalized.

    Where the law is a mixture, one part of it the teacher's distribution, `teacher_mass` (...) is that part's weight, 0 to 1: each
    token then has a writer, the teacher with probability teacher_mass * p_T / law. Without it a token has been written by the
    teacher where it replaced the student's proposal.
    """

    logp: Tensor
    teacher_mass: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """The law at each position: the student's, or where `by_teacher` is True the teacher's, or the `blend` if there is one.

    `threshold` is what the divergence was compared with, or NaN. `by_teacher` is on the device of the positions. A threshold in
    float64 is on the CPU: not every device has that type.
    """

    by_teacher: Tensor
    threshold: Tensor
    blend: Blend | None = None


class Policy(ABC):
    """Decides, position by position, the law that writes. It keeps no state: all it knows of a row is what the row's record says.

    `needs_teacher` is False where the student writes alone and no teacher runs; `needs_history` is True where the decision looks
    at the row's past.
    """

    needs_teacher: ClassVar[bool] = True
    needs_history: ClassVar[bool] = False

    @property
    def writers(self) -> tuple[str, ...]:
        """Who may write a token at all, of "student" and "teacher"."""
        return ("student", "teacher") if self.needs_teacher else ("student",)

    @abstractmethod
    def decide(self, positions: Positions) -> Decision:
        """The law at each position, shapes as given.

        It may depend on the two distributions, the position, its coin and the row's past, and on nothing else: then it is the
        same whether positions are decided one at a time or a block at a time. Earlier positions of a block are the past of
        later ones: each is decided as if the block had been kept up to it.
        """

    def at_step(self, step: int) -> Policy:
        """The policy in force at a training step, from 0: itself, unless it changes as training goes on."""
        return self


def without_threshold(by_teacher: Tensor, blend: Blend | None = None) -> Decision:
    """A decision that compared the divergence with nothing."""
    return Decision(by_teacher, torch.full(by_teacher.shape, math.nan, device=by_teacher.device), blend)


@dataclass(frozen=True)
class Student(Policy):
    """The student writes every token: on-policy distillation (GKD, arXiv 2306.13649, with lambda = 1)."""

    needs_teacher: ClassVar[bool] = False

    def decide(self, positions: Positions) -> Decision:
        """The student everywhere; the threshold is NaN."""
        return without_threshold(torch.zeros_like(positions.position, dtype=torch.bool))


@dataclass(frozen=True)
class Teacher(Policy):
    """The teacher writes every token: the text of sequence-level distillation (Kim and Rush 2016)."""

    @property
    def writers(self) -> tuple[str, ...]:
        """The teacher."""
        return ("teacher",)

    def decide(self, positions: Positions) -> Decision:
        """The teacher everywhere; the threshold is NaN."""
        return without_threshold(torch.ones_like(positions.position, dtype=torch.bool))
