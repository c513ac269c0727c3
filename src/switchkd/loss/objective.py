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

from switchkd.distributions.divergences import REVERSE_KL, Divergence
from switchkd.distributions.shaping import entropy, log_probabilities
from switchkd.errors import UserError
from switchkd.loss.chunked import chunked_sum
from switchkd.loss.signals import TeacherSignal, TopKTeacher
from switchkd.loss.targets import OF_TEACHER, Target
from switchkd.loss.weight import Weight
from switchkd.models.heads import Head

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]
CrossEntropyOn = Literal["data", "data+teacher", "all"]


@dataclass(frozen=True)
class Objective:
    """What is minimized at each counted position, in nats.

    divergence(student, target) at `loss_temperature` + cross_entropy_weight * -log p_student(token), times the product of the
    `weights`. The `target` is made of the teacher's distribution. Without a `divergence` no teacher is asked. The loss
    temperature is not the sampling temperature and does not change it; gradients are not rescaled by its square. The
    cross-entropy falls on text of `cross_entropy_on` alone: on its own text a student learns nothing from it. Raises UserError
    for values out of range.

    `teacher_text_divergence` replaces the divergence at tokens that the teacher wrote (DistiLLM-2, arXiv 2503.07067).
    `long_term_weight` * return * -log p_student(token) is added if returns are given: their policy gradient
    (policy_gradient.py). `start_weight` * start_divergence(student, start model) keeps the student near where it began
    (StableOPD, arXiv 2604.08527).
    """

    divergence: DivergenceFunction | None
    cross_entropy_weight: float = 0.0
    loss_temperature: float = 1.0
    weights: tuple[Weight, ...] = ()
    target: Target = OF_TEACHER
    teacher_text_divergence: DivergenceFunction | None = None
    long_term_weight: float = 0.0
    start_weight: float = 0.0
    start_divergence: DivergenceFunction = REVERSE_KL
    cross_entropy_on: CrossEntropyOn = "data"

    def __post_init__(self) -> None:
        for key in ("cross_entropy_weight", "long_term_weight", "start_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key} is {getattr(self, key)}; it has to be 0 or more")
        if self.divergence is None and not self.cross_entropy_weight:
            raise UserError(
                "cross_entropy_weight is 0 without a divergence: there is nothing to minimize; set one of them"
            )
        if not self.loss_temperature > 0:
            raise UserError(f"loss_temperature is {self.loss_temperature}; it has to be positive")
        if self.cross_entropy_on not in get_args(CrossEntropyOn):
            choices = ", ".join(get_args(CrossEntropyOn))
            raise UserError(f"cross_entropy_on is {self.cross_entropy_on!r}; choose one of {choices}")
        for key in ("margin_top_k", "outlier_divergence"):
            # Each refuses weights that do not go together.
            getattr(self, key)
        if self.outlier_divergence and self.teacher_text_divergence:
            raise UserError(
                "teacher_text_divergence is set, but a weight compares outliers by a divergence of its own; set one of them"
            )

    @property
    def outlier_divergence(self) -> Divergence | None:
        """The divergence that a weight brings for the tokens that it does not trust."""
        found = [weight.outlier_divergence for weight in self.weights if weight.outlier_divergence]
        if len(found) > 1:
            raise UserError("two weights compare outliers by a divergence of their own; take one of them")
        return found[0] if found else None

    @property
    def other_divergence(self) -> DivergenceFunction | None:
        """What takes over a share of the divergence at some tokens: those of the teacher's text, or outliers."""
        return self.teacher_text_divergence or self.outlier_divergence

    def divergence_shared(
        self, student_logp: Tensor, target_logp: Tensor, other_share: Tensor | None, single: slice = slice(None)
    ) -> Tensor:
        """The divergence (P,) of log-probabilities (P, E), of which the other one has a share (P,); None: it has none.

        `single` are the events that are one id each.
        """
        assert self.divergence is not None
        other = self.other_divergence
        if other is None or other_share is None:
            return self.divergence(student_logp, target_logp)
        loss = student_logp.new_zeros(other_share.shape)
        # Each sees its own positions alone: elsewhere it may be infinite, and its gradient NaN even under a weight of 0.
        for function, share in ((self.divergence, 1 - other_share), (other, other_share)):
            mask = share > 0
            events = single if getattr(function, "of_single_ids", False) else slice(None)
            part = function(student_logp[mask][:, events], target_logp[mask][:, events]) * share[mask]
            loss = loss + torch.zeros_like(loss).masked_scatter(mask, part)
        return loss

    @property
    def needs_start(self) -> bool:
        """Whether the student's start model takes part."""
        return self.start_weight > 0 or self.target.needs_start

    @property
    def margin_top_k(self) -> int:
        """Over how many of the student's likeliest tokens the engine is to record the teacher's margin; 0: not at all."""
        found = {weight.margin_top_k for weight in self.weights if weight.margin_top_k}
        if len(found) > 1:
            raise UserError(
                f"two weights read the teacher's margin over {' and '.join(map(str, sorted(found)))} candidates, but a rollout "
                f"records one margin; give both the same top_k"
            )
        return found.pop() if found else 0

    @property
    def reads_logp(self) -> bool:
        """Whether rollouts have to bring both models' log-probabilities of their tokens."""
        return self.long_term_weight > 0 or any(weight.reads_logp for weight in self.weights)

    def cross_entropy_factor(self, written_by_teacher_N: Tensor, rolled_out_N: Tensor) -> Tensor | None:
        """What multiplies each position's cross-entropy (N,), float32: 1 on text of `cross_entropy_on`, else 0; None is 1."""
        if self.cross_entropy_on == "all" or not self.cross_entropy_weight:
            return None
        is_on_N = ~rolled_out_N if self.cross_entropy_on == "data" else ~rolled_out_N | written_by_teacher_N
        return is_on_N.float()


@dataclass(frozen=True, eq=False)
class Counted:
    """The N positions that count, all tensors in the same order.

    `hidden_NH` are the student's last hidden states that predict `token_ids_N`. `weight_N` multiplies each position's loss,
    but not its report, and `cross_entropy_factor_N` its cross-entropy alone. `other_share_N`, 0 to 1, is the share of the
    divergence that the objective's other one takes over: that for the teacher's text, or for outliers. `return_N` is the return
    of the long-term term, in nats. `start` is what the student's start model says at these positions, where the objective
    `needs_start`.
    """

    hidden_NH: Tensor
    token_ids_N: Tensor
    weight_N: Tensor | None = None
    other_share_N: Tensor | None = None
    return_N: Tensor | None = None
    start: TeacherSignal | None = None
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
    agreement to the report, at the cost of a few passes over each chunk. Raises ValueError if a divergence has no teacher, or
    a start model that is needed is missing.

    Memory beyond the inputs: one gradient of the hidden states, one of the head if it trains, two tensors of
    (`chunk_positions`, V), about 64 MB each by default, and a dozen of an eighth of that.
    """
    if objective.divergence is not None and teacher is None:
        raise ValueError("this objective has a divergence, so it needs a teacher signal")
    if objective.needs_start and counted.start is None:
        raise ValueError("this objective compares with the start model, so it needs that model's signal")
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
        objective, share_N, start = self.objective, self.counted.other_share_N, self.counted.start
        # The start model is here in full, whatever is kept of the teacher.
        start_logp_PV = None if start is None else start.compare(student_logp_PV, at, chunk)[1]
        target_logp_PE = objective.target(teacher_logp_PE, student_logp_PE.detach(), start_logp_PV)
        share_P = None if share_N is None else share_N[at]
        # Behind the kept ids stands the event of all others.
        single = slice(teacher.ids_NK.shape[-1] if isinstance(teacher, TopKTeacher) else None)
        divergence_P = objective.divergence_shared(student_logp_PE, target_logp_PE, share_P, single)
        self._keep("divergence_N", at, divergence_P)
        if self.measure:
            self._keep("student_entropy_N", at, entropy(student_logp_PE.detach()))
            self._keep("teacher_entropy_N", at, entropy(teacher_logp_PE))
            self._keep("agreement_N", at, student_logp_PE.argmax(dim=-1) == teacher_logp_PE.argmax(dim=-1))
        if objective.start_weight and start_logp_PV is not None:
            start_P = objective.start_divergence(student_logp_PV, start_logp_PV)
            divergence_P = divergence_P + objective.start_weight * start_P
        return divergence_P

    def _keep(self, name: str, at: slice, values_P: Tensor) -> None:
        # Allocated once: small tensors left between the large ones of each piece would keep a CPU from reusing its memory.
        if name not in self.measured:
            self.measured[name] = values_P.new_empty(self.counted.token_ids_N.shape)
        self.measured[name][at] = values_P.detach()
