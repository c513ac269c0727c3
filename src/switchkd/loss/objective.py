"""The training loss: counted positions -> a chunk at a time through both heads -> divergence -> sum / denominator.

Masking, temperature, chunking and reduction live here, in signals.py and in chunked.py, and nowhere else.

Shape letters: N counted positions, P those of a piece of a chunk, V vocabulary, H hidden, E events that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from switchkd.distributions.shaping import entropy, log_probabilities
from switchkd.errors import UserError
from switchkd.loss.chunked import chunked_sum
from switchkd.loss.signals import TeacherSignal
from switchkd.models.heads import Head

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]
TrainOn = Literal["all", "student", "teacher"]
CrossEntropyOn = Literal["data", "data+teacher", "all"]


@dataclass(frozen=True)
class Objective:
    """What is minimized at each counted position, in nats.

    divergence(student, teacher) at `loss_temperature` + cross_entropy_weight * -log p_student(token). Without a `divergence`
    no teacher is asked. The loss temperature is not the sampling temperature and does not change it; gradients are not
    rescaled by its square. Tokens of rollouts are weighted by their writer (`weights`), and the cross-entropy falls on text of
    `cross_entropy_on` alone: on its own text a student learns nothing from it. Raises UserError for values out of range.

    `teacher_text_divergence` replaces the divergence at tokens that the teacher wrote (DistiLLM-2, arXiv 2503.07067).
    `long_term_weight` * return * -log p_student(token) is added if returns are given: their policy gradient
    (policy_gradient.py).
    """

    divergence: DivergenceFunction | None
    cross_entropy_weight: float = 0.0
    loss_temperature: float = 1.0
    train_on: TrainOn = "all"
    student_token_weight: float = 1.0
    teacher_token_weight: float = 1.0
    teacher_text_divergence: DivergenceFunction | None = None
    long_term_weight: float = 0.0
    cross_entropy_on: CrossEntropyOn = "data"

    def __post_init__(self) -> None:
        for key in ("cross_entropy_weight", "long_term_weight", "student_token_weight", "teacher_token_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key} is {getattr(self, key)}; it has to be 0 or more")
        if self.divergence is None and not self.cross_entropy_weight:
            raise UserError(
                "cross_entropy_weight is 0 without a divergence: there is nothing to minimize; set one of them"
            )
        if not self.loss_temperature > 0:
            raise UserError(f"loss_temperature is {self.loss_temperature}; it has to be positive")
        for key, choices in (("train_on", get_args(TrainOn)), ("cross_entropy_on", get_args(CrossEntropyOn))):
            if getattr(self, key) not in choices:
                raise UserError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}")
        for writer in ("student", "teacher"):
            weight = getattr(self, f"{writer}_token_weight")
            if weight != 1 and self.train_on not in ("all", writer):
                raise UserError(
                    f"{writer}_token_weight is {weight}, but train_on {self.train_on!r} leaves these tokens out"
                )

    def divergence_by_writer(self, student_logp: Tensor, teacher_logp: Tensor, by_teacher: Tensor | None) -> Tensor:
        """The divergence (P,) of log-probabilities (P, E), by who wrote each token (P,), bool; None: the writer is unknown."""
        assert self.divergence is not None
        if self.teacher_text_divergence is None or by_teacher is None:
            return self.divergence(student_logp, teacher_logp)
        loss = student_logp.new_zeros(by_teacher.shape)
        # Each sees its own positions alone: elsewhere it may be infinite, and its gradient NaN even under a mask.
        for function, mask in ((self.divergence, ~by_teacher), (self.teacher_text_divergence, by_teacher)):
            loss = loss.masked_scatter(mask, function(student_logp[mask], teacher_logp[mask]))
        return loss

    def weights(self, written_by_teacher_N: Tensor, rolled_out_N: Tensor) -> Tensor:
        """What multiplies each position's loss (N,), float32: the weight of its writer, 0 for a writer not trained on.

        Always 1 at the data set's text, which neither model wrote.
        """
        of_student = 0.0 if self.train_on == "teacher" else self.student_token_weight
        of_teacher = 0.0 if self.train_on == "student" else self.teacher_token_weight
        of_writer_N = of_student + (of_teacher - of_student) * written_by_teacher_N.float()
        return torch.where(rolled_out_N, of_writer_N, 1.0)

    def cross_entropy_factor(self, written_by_teacher_N: Tensor, rolled_out_N: Tensor) -> Tensor | None:
        """What multiplies each position's cross-entropy (N,), float32: 1 on text of `cross_entropy_on`, else 0; None is 1."""
        if self.cross_entropy_on == "all" or not self.cross_entropy_weight:
            return None
        is_on_N = ~rolled_out_N if self.cross_entropy_on == "data" else ~rolled_out_N | written_by_teacher_N
        return is_on_N.float()


@dataclass(frozen=True, eq=False)
class Counted:
    """The N positions that count, all tensors in the same order.

    `hidden_NH` are the student's last hidden states that predict `token_ids_N`. `weight_N` multiplies each position's loss, but
    not its report, and `cross_entropy_factor_N` its cross-entropy alone. `written_by_teacher_N` (bool) chooses between two
    divergences. `return_N` is the return of the long-term term, in nats.
    """

    hidden_NH: Tensor
    token_ids_N: Tensor
    weight_N: Tensor | None = None
    written_by_teacher_N: Tensor | None = None
    return_N: Tensor | None = None
    cross_entropy_factor_N: Tensor | None = None


@dataclass
class Report:
    """What was measured at each counted position, detached: each (N,), or empty if not measured.

    Divergence, cross-entropy and entropies are in nats. The entropies, and the agreement of the two models on the likeliest
    event (bool), are those of the distributions that the divergence compares, at the loss temperature.
    """

    divergence_N: Tensor = field(default_factory=lambda: torch.empty(0))
    cross_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    student_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    teacher_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    agreement_N: Tensor = field(default_factory=lambda: torch.empty(0))


def distillation_loss(
    counted: Counted,
    head: Head,
    objective: Objective,
    *,
    teacher: TeacherSignal | None,
    denominator: Tensor | float,
    measure: bool = False,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Report]:
    """The loss (a scalar in nats: the sum over the counted positions / `denominator`) and its per-position report.

    `head` is the student's; `teacher` is the signal at the same positions, at the objective's loss temperature. `denominator`
    is the number of counted positions (with a weight other than 0) of the whole optimizer step over all processes, so that no
    split into micro-batches or processes changes the gradient; with N = 0 the loss is exactly 0. `measure` adds entropies and
    agreement to the report, at the cost of a few passes over each chunk. Raises ValueError if a divergence has no teacher.

    Memory beyond the inputs: one gradient of the hidden states, one of the head if it trains, two tensors of
    (`chunk_positions`, V), about 64 MB each by default, and a dozen of an eighth of that.
    """
    if objective.divergence is not None and teacher is None:
        raise ValueError("this objective has a divergence, so it needs a teacher signal")
    loss = _PositionLoss(counted, head, objective, None if objective.divergence is None else teacher, measure=measure)
    total = chunked_sum(counted.hidden_NH, head, loss, chunk_positions)
    return total / denominator, Report(**loss.measured)


@dataclass
class _PositionLoss:
    """The loss of each position of a piece, as chunked.py asks for it, and what has been measured on the way."""

    counted: Counted
    head: Head
    objective: Objective
    teacher: TeacherSignal | None
    measure: bool
    measured: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, projected_PV: Tensor, at: slice, chunk: slice) -> Tensor:
        counted, objective = self.counted, self.objective
        logits_PV = self.head.transform(projected_PV)
        loss_P = logits_PV.new_zeros(logits_PV.shape[0], dtype=torch.promote_types(logits_PV.dtype, torch.float32))
        if self.teacher is not None:
            loss_P = self._divergence(self.teacher, logits_PV, at, chunk)
        if objective.cross_entropy_weight or counted.return_N is not None:
            cross_entropy_P = -log_probabilities(logits_PV, 1.0).gather(-1, counted.token_ids_N[at, None])[:, 0]
            self._keep("cross_entropy_N", at, cross_entropy_P)
            returns = 0.0 if counted.return_N is None else counted.return_N[at].to(cross_entropy_P)
            factor_N = counted.cross_entropy_factor_N
            weight = objective.cross_entropy_weight * (1.0 if factor_N is None else factor_N[at])
            loss_P = loss_P + (weight + objective.long_term_weight * returns) * cross_entropy_P
        return loss_P if counted.weight_N is None else loss_P * counted.weight_N[at]

    def _divergence(self, teacher: TeacherSignal, logits_PV: Tensor, at: slice, chunk: slice) -> Tensor:
        student_logp_PV = log_probabilities(logits_PV, self.objective.loss_temperature)
        student_logp_PE, teacher_logp_PE = teacher.compare(student_logp_PV, at, chunk)
        by_teacher_N = self.counted.written_by_teacher_N
        by_teacher_P = None if by_teacher_N is None else by_teacher_N[at]
        divergence_P = self.objective.divergence_by_writer(student_logp_PE, teacher_logp_PE, by_teacher_P)
        self._keep("divergence_N", at, divergence_P)
        if self.measure:
            self._keep("student_entropy_N", at, entropy(student_logp_PE.detach()))
            self._keep("teacher_entropy_N", at, entropy(teacher_logp_PE))
            self._keep("agreement_N", at, student_logp_PE.argmax(dim=-1) == teacher_logp_PE.argmax(dim=-1))
        return divergence_P

    def _keep(self, name: str, at: slice, values_P: Tensor) -> None:
        # Allocated once: small tensors left between the large ones of each piece would keep a CPU from reusing its memory.
        if name not in self.measured:
            self.measured[name] = values_P.new_empty(self.counted.token_ids_N.shape)
        self.measured[name][at] = values_P.detach()
