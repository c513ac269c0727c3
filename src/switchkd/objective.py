"""The training loss: counted positions -> a chunk at a time through both heads -> divergence -> sum / denominator.

Logits of neither model ever exist in full. The student's gradient is taken inside the chunk loop, so that nothing of
size (N, V) is kept for the backward pass: what stays is the gradient of the hidden states, and of the head where it trains.

Masking, temperature, chunking and reduction live here and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.heads import Head

# A chunk's logits hold about this many numbers: 32 MB in float32, large enough to keep a matrix product busy.
_CHUNK_NUMBERS = 1 << 23

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]
TrainOn = Literal["all", "student", "teacher"]


@dataclass(frozen=True)
class Objective:
    """What is minimised at each counted position, in nats.

    divergence(student, teacher) at `loss_temperature` + cross_entropy_weight * -log p_student(token). Without a
    `divergence` no teacher is asked. The loss temperature is not the sampling temperature, and has no effect on it;
    gradients are not rescaled by its square. The tokens of rollouts weigh what `token_weights` gives their writer.
    """

    divergence: DivergenceFunction | None
    cross_entropy_weight: float = 0.0
    loss_temperature: float = 1.0
    train_on: TrainOn = "all"
    student_token_weight: float = 1.0
    teacher_token_weight: float = 1.0

    def weights(self, written_by_teacher_N: Tensor, rolled_out_N: Tensor) -> Tensor:
        """What multiplies each position's loss (N,); 1 at the data set's text, which neither model wrote, whatever is set."""
        of_writer_N = token_weights(
            written_by_teacher_N,
            self.train_on,
            student_token_weight=self.student_token_weight,
            teacher_token_weight=self.teacher_token_weight,
        )
        return torch.where(rolled_out_N, of_writer_N, 1.0)


def token_weights(
    written_by_teacher: Tensor,
    train_on: TrainOn = "all",
    *,
    student_token_weight: float = 1.0,
    teacher_token_weight: float = 1.0,
) -> Tensor:
    """What each token's loss is multiplied by, float32 in the shape of `written_by_teacher` (bool): its writer's weight.

    `train_on` "student" or "teacher" leaves the other writer's tokens out, with weight 0. It is for rollouts: a data set's
    text has no writer here.
    """
    of_student = 0.0 if train_on == "teacher" else student_token_weight
    of_teacher = 0.0 if train_on == "student" else teacher_token_weight
    return of_student + (of_teacher - of_student) * written_by_teacher.float()


@dataclass
class Report:
    """Per counted position, detached, each of shape (N,) once the loss has run; empty where not measured.

    Divergence, cross-entropy and entropies are in nats; the entropies, and whether the two agree (bool) on the likeliest, are
    those of the distributions that the divergence compares, at the loss temperature: of K + 1 events with a top-k teacher.
    """

    divergence_N: Tensor = field(default_factory=lambda: torch.empty(0))
    cross_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    student_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    teacher_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))
    agreement_N: Tensor = field(default_factory=lambda: torch.empty(0))


# ------------------------------------------------------------------------------------------------- what the teacher said


class TeacherSignal(Protocol):
    """What a teacher says at the counted positions, and between which events it can be compared with the student.

    Called with the student's log-probabilities (C, V) at the positions of `chunk`, it returns those of the student and of
    the teacher, natural log, both (C, E) in the student's type and on its device, over the same E events. Gradients pass to
    the student's.
    """

    def __call__(self, student_logp_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """The pair for these positions."""
        ...


def dense_teacher(hidden_NH: Tensor, head: Head, loss_temperature: float = 1.0) -> TeacherSignal:
    """The teacher's whole distributions, made from its hidden states a chunk at a time."""

    def pair(student_logp_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logp_CV = _logp(head(hidden_NH[chunk].to(head.weight_VH.device)), loss_temperature)
        return student_logp_CV, teacher_logp_CV.to(student_logp_CV)

    return pair


def logp_teacher(logp_NV: Tensor, loss_temperature: float = 1.0) -> TeacherSignal:
    """The teacher's whole distributions, kept as log-probabilities (N, V) at temperature 1."""

    def pair(student_logp_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        return student_logp_CV, _logp(logp_NV[chunk].detach(), loss_temperature).to(student_logp_CV)

    return pair


def top_k_teacher(
    ids_NK: Tensor, logp_NK: Tensor, loss_temperature: float = 1.0, *, rest_logp_N: Tensor | None = None
) -> TeacherSignal:
    """The teacher's log-probabilities of K distinct ids at each position, at temperature 1; all others are one event.

    The two models are compared over K + 1 events: the ids, and "any other", with what is left of the mass of each. An
    f-divergence (the KLs, skewed or not, Jensen-Shannon, total variation) over them is at most the one over the vocabulary.
    `rest_logp_N` is the rest's log-probability; without it, it is what the K leave over, to the rounding of their sum. In both
    models the rest's mass is lifted by one rounding, so that an empty one is finite. With K = V there is no rest, but K events.

    Raises UserError for another loss temperature: the rest's mass at one cannot be told from its mass at 1. Raises
    ValueError where the shapes differ.
    """
    if loss_temperature != 1:
        raise UserError(
            f"loss_temperature is {loss_temperature}, but of the teacher only the likeliest tokens were kept, at temperature "
            f"1; set loss_temperature to 1, or keep whole distributions"
        )
    if ids_NK.shape != logp_NK.shape:
        raise ValueError(f"there are ids of shape {tuple(ids_NK.shape)} and log-probs of {tuple(logp_NK.shape)}")

    def pair(student_logp_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        ids_CK, teacher_logp_CK = ids_NK[chunk].to(student_logp_CV.device), logp_NK[chunk].detach().to(student_logp_CV)
        student_logp_CK = student_logp_CV.gather(-1, ids_CK)
        if ids_CK.shape[-1] == student_logp_CV.shape[-1]:
            return student_logp_CK, teacher_logp_CK
        if rest_logp_N is None:
            teacher_rest_C = (1 - teacher_logp_CK.exp().sum(dim=-1)).clamp(min=0).log()
        else:
            teacher_rest_C = rest_logp_N[chunk].detach().to(student_logp_CV)
        lift = student_logp_CV.new_tensor(torch.finfo(student_logp_CV.dtype).eps).log()
        teacher_rest_C = torch.logaddexp(teacher_rest_C, lift)
        # The lift takes the place of the first of the K ids, and nothing those of the others.
        instead_CK = torch.full_like(student_logp_CK, -torch.inf)
        instead_CK[:, 0] = lift
        student_rest_C = student_logp_CV.scatter(-1, ids_CK, instead_CK).logsumexp(dim=-1)
        return (
            torch.cat([student_logp_CK, student_rest_C[:, None]], dim=-1),
            torch.cat([teacher_logp_CK, teacher_rest_C[:, None]], dim=-1),
        )

    return pair


def _logp(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in nats, at least float32."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return torch.log_softmax(logits_NV / temperature, dim=-1)


# -------------------------------------------------------------------------------------------------------------- the loss


class _ChunkedSum(torch.autograd.Function):
    """Sum of a per-position loss of the projected hidden states, with the gradients taken chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        position_loss: Callable[[Tensor, slice], Tensor],
        chunk_positions: int,
        training: bool,
    ) -> Tensor:
        inputs = (hidden_NH, weight_VH, bias_V)
        wanted = [training and tensor is not None and tensor.requires_grad for tensor in inputs]
        total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
        hidden_grad = torch.zeros_like(hidden_NH) if wanted[0] else None
        weight_grad = torch.zeros_like(weight_VH) if wanted[1] else None
        bias_grad = torch.zeros_like(bias_V) if bias_V is not None and wanted[2] else None
        weight = weight_VH.detach().to(hidden_NH.dtype)
        bias = None if bias_V is None else bias_V.detach().to(hidden_NH.dtype)
        for start in range(0, hidden_NH.shape[0], chunk_positions):
            chunk = slice(start, min(start + chunk_positions, hidden_NH.shape[0]))
            hidden = hidden_NH.detach()[chunk]
            with torch.enable_grad():
                logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_(any(wanted))
                loss = position_loss(logits, chunk).sum()
            total += loss.detach()
            if not any(wanted):
                continue
            (logits_grad,) = torch.autograd.grad(loss, logits)
            if hidden_grad is not None:
                # Under autocast the logits, and so their gradient, are of a lower precision than the weight.
                hidden_grad[chunk] = logits_grad.to(weight.dtype) @ weight
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T.to(weight_grad.dtype), hidden.to(weight_grad.dtype))
            if bias_grad is not None:
                bias_grad += logits_grad.sum(dim=0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grads = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def distillation_loss(
    student_hidden_NH: Tensor,
    head: Head,
    token_ids_N: Tensor,
    objective: Objective,
    *,
    teacher: TeacherSignal | None,
    denominator: Tensor | float,
    weight_N: Tensor | None = None,
    measure: bool = False,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Report]:
    """The loss (a scalar in nats: sum over the N counted positions / `denominator`) and its per-position report.

    `student_hidden_NH` are the student's last hidden states that predict `token_ids_N`; `teacher` is what the teacher says
    at the same positions, at the objective's loss temperature. `denominator` is the number of counted positions (with a
    weight other than 0) of the whole optimiser step over all processes, so that no split into micro-batches or processes
    changes the gradient; with N = 0 the loss is exactly 0. `weight_N` multiplies each position's loss, not its report.
    `measure` adds entropies and agreement to the report, at the cost of a few passes over each chunk.

    Memory beyond the inputs: one gradient of the hidden states, one of the head where it trains, and a few tensors of
    (`chunk_positions`, V), by default about 32 MB each; the value and the gradients do not depend on it.
    """
    chunk_positions = chunk_positions or max(16, _CHUNK_NUMBERS // head.weight_VH.shape[0])
    measured: defaultdict[str, list[Tensor]] = defaultdict(list)

    def position_loss(projected_CV: Tensor, chunk: slice) -> Tensor:
        logits_CV = head.transform(projected_CV)
        loss_C = logits_CV.new_zeros(logits_CV.shape[0], dtype=torch.promote_types(logits_CV.dtype, torch.float32))
        if objective.divergence is not None:
            if teacher is None:
                raise ValueError("this objective has a divergence, so it needs a teacher signal")
            student_logp, teacher_logp = teacher(_logp(logits_CV, objective.loss_temperature), chunk)
            loss_C = objective.divergence(student_logp, teacher_logp)
            measured["divergence_N"].append(loss_C.detach())
            if measure:
                measured["student_entropy_N"].append(_entropy(student_logp.detach()))
                measured["teacher_entropy_N"].append(_entropy(teacher_logp))
                measured["agreement_N"].append(student_logp.argmax(dim=-1) == teacher_logp.argmax(dim=-1))
        if objective.cross_entropy_weight:
            log_probs = _logp(logits_CV, 1.0)
            cross_entropy_C = -log_probs.gather(-1, token_ids_N[chunk, None])[:, 0]
            measured["cross_entropy_N"].append(cross_entropy_C.detach())
            loss_C = loss_C + objective.cross_entropy_weight * cross_entropy_C
        return loss_C if weight_N is None else loss_C * weight_N[chunk]

    # Inside the function gradients are always off, and a parameter asks for one even where the caller wants none.
    total: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH, head.weight_VH, head.bias_V, position_loss, chunk_positions, torch.is_grad_enabled()
    )
    return total / denominator, Report(**{name: torch.cat(parts) for name, parts in measured.items()})


def _entropy(logp: Tensor) -> Tensor:
    """In nats; an excluded id has no part in it."""
    entropy: Tensor = torch.special.entr(logp.exp()).sum(dim=-1)
    return entropy
