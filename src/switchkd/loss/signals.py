"""What a teacher says at the counted positions, and the events over which it is compared with the student.

Shape letters: N counted positions, C those of a chunk, P those of a piece, V vocabulary, H hidden, K ids kept, E events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from switchkd.distributions.shaping import log_probabilities
from switchkd.errors import UserError
from switchkd.models.heads import Head


class TeacherSignal(Protocol):
    """What a teacher says at the counted positions."""

    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities (P, E) in nats of student and teacher over the same E events, at the positions `at`.

        Both have the student's type and device; gradients pass to the student's. `at` is a piece of `chunk`, whose pieces
        come in order, so that a signal can prepare the whole chunk at its first piece.
        """
        ...


@dataclass(eq=False)
class DenseTeacher:
    """The teacher's whole distributions, from its last hidden states (N, H) and its head; E = V."""

    hidden_NH: Tensor
    head: Head
    loss_temperature: float = 1.0
    _prepared: tuple[slice, Tensor] | None = field(default=None, init=False, repr=False)

    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal`."""
        return student_logp_PV, self.logp(student_logp_PV, at, chunk)

    def logp(self, like: Tensor, at: slice, chunk: slice) -> Tensor:
        """The teacher's log-probabilities (P, V) in the type and on the device of `like`; positions as in `compare`."""
        logits_PV = self._logits_of(chunk)[at.start - chunk.start : at.stop - chunk.start]
        if at.stop == chunk.stop:
            # Freed here, or the student's next chunk and, after the last one, the backward pass would find it in memory.
            self._prepared = None
        return log_probabilities(logits_PV.to(like.device), self.loss_temperature).to(like)

    def _logits_of(self, chunk: slice) -> Tensor:
        # A piece alone would make too small a matrix product.
        if self._prepared is None or self._prepared[0] != chunk:
            with torch.no_grad():
                self._prepared = chunk, self.head(self.hidden_NH[chunk].to(self.head.weight_VH.device))
        return self._prepared[1]


@dataclass(frozen=True, eq=False)
class DenseTeachers:
    """The whole distributions of several teachers, each at its own positions; E = V.

    `which_N` (N,), int64 on the CPU, is the place of each position's teacher among `teachers`, which hold their own positions
    alone, in the same order.
    """

    which_N: Tensor
    teachers: Sequence[DenseTeacher]

    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal`."""
        teacher_logp_PV = torch.empty_like(student_logp_PV, requires_grad=False)
        for place, teacher in enumerate(self.teachers):
            is_own_N = self.which_N == place
            own_P = is_own_N[at].nonzero()[:, 0].to(student_logp_PV.device)
            if len(own_P):
                # The positions of a piece follow each other among the teacher's own ones, too.
                teacher_logp_PV[own_P] = teacher.logp(student_logp_PV, _among(is_own_N, at), _among(is_own_N, chunk))
        return student_logp_PV, teacher_logp_PV


def _among(is_own_N: Tensor, part: slice) -> slice:
    """A part of all positions as one of those that a teacher has."""
    before = int(is_own_N[: part.start].count_nonzero())
    return slice(before, before + int(is_own_N[part].count_nonzero()))


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """The teacher's log-probabilities of K distinct ids at each position, at temperature 1; all other ids are one event.

    The two models are compared over E = K + 1 events: the ids, and "any other", with the rest of each model's mass. An
    f-divergence (the KLs, skewed or not, Jensen-Shannon, total variation) over them is at most the one over the vocabulary.
    What looks at single ids (adaptive KL, a proximal target) takes "any other" for one.
    `rest_logp_N` is the rest's log-probability; without it, it is what the K leave over, to the rounding of their sum. In both
    models the rest's mass is lifted by one rounding, so that an empty one is finite. With K = V there is no rest, and E = K.

    Raises UserError for another loss temperature: the rest's mass there does not follow from its mass at 1. Raises ValueError
    if the shapes differ.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    loss_temperature: float = 1.0
    rest_logp_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.loss_temperature != 1:
            raise UserError(
                f"loss_temperature is {self.loss_temperature}, but of the teacher only the likeliest tokens were kept, at "
                f"temperature 1; set loss_temperature to 1, or keep whole distributions"
            )
        if self.ids_NK.shape != self.logp_NK.shape:
            shapes = f"ids_NK has shape {tuple(self.ids_NK.shape)}, logp_NK has {tuple(self.logp_NK.shape)}"
            raise ValueError(f"{shapes}; give both as (N, K)")

    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal`."""
        ids_PK = self.ids_NK[at].to(student_logp_PV.device)
        teacher_logp_PK = self.logp_NK[at].detach().to(student_logp_PV)
        student_logp_PK = student_logp_PV.gather(-1, ids_PK)
        if ids_PK.shape[-1] == student_logp_PV.shape[-1]:
            return student_logp_PK, teacher_logp_PK
        if self.rest_logp_N is None:
            teacher_rest_P = (1 - teacher_logp_PK.exp().sum(dim=-1)).clamp(min=0).log()
        else:
            teacher_rest_P = self.rest_logp_N[at].detach().to(student_logp_PV)
        lift = student_logp_PV.new_tensor(torch.finfo(student_logp_PV.dtype).eps).log()
        teacher_rest_P = torch.logaddexp(teacher_rest_P, lift)
        # The first of the K ids carries the lift; the other K - 1 are excluded.
        instead_PK = torch.full_like(student_logp_PK, -torch.inf)
        instead_PK[:, 0] = lift
        student_rest_P = student_logp_PV.scatter(-1, ids_PK, instead_PK).logsumexp(dim=-1)
        return (
            torch.cat([student_logp_PK, student_rest_P[:, None]], dim=-1),
            torch.cat([teacher_logp_PK, teacher_rest_P[:, None]], dim=-1),
        )
