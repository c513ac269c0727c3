"""The training loss: counted positions -> a chunk at a time through both heads -> divergence -> sum / denominator.

Logits of neither model ever exist in full. The student's gradient is taken inside the chunk loop, so that nothing of
size (N, V) is kept for the backward pass: what stays is the gradient of the hidden states, and of the head where it trains.

Masking, temperature, chunking and reduction live here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from switchkd.heads import Head

# A chunk's logits hold about this many numbers: 32 MB in float32, large enough to keep a matrix product busy.
_CHUNK_NUMBERS = 1 << 23

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]
TeacherSignal = Callable[[slice], Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised at each counted position, in nats.

    divergence(student, teacher) at `loss_temperature` + cross_entropy_weight * -log p_student(token). Without a
    `divergence` no teacher is asked. The loss temperature is not the sampling temperature, and has no effect on it;
    gradients are not rescaled by its square.
    """

    divergence: DivergenceFunction | None
    cross_entropy_weight: float = 0.0
    loss_temperature: float = 1.0


@dataclass
class Report:
    """Per counted position, detached, in nats, each of shape (N,) once the loss has run; empty where not measured."""

    divergence_N: Tensor = field(default_factory=lambda: torch.empty(0))
    cross_entropy_N: Tensor = field(default_factory=lambda: torch.empty(0))


def dense_teacher(hidden_NH: Tensor, head: Head, loss_temperature: float = 1.0) -> TeacherSignal:
    """The teacher's log-probabilities for a slice of the counted positions, made from its hidden states on demand."""

    def logp(chunk: slice) -> Tensor:
        with torch.no_grad():
            return _logp(head(hidden_NH[chunk].to(head.weight_VH.device)), loss_temperature)

    return logp


def _logp(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in nats, at least float32."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return torch.log_softmax(logits_NV / temperature, dim=-1)


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
    chunk_positions: int | None = None,
) -> tuple[Tensor, Report]:
    """The loss (a scalar in nats: sum over the N counted positions / `denominator`) and its per-position report.

    `student_hidden_NH` are the student's last hidden states that predict `token_ids_N`; `teacher` gives the teacher's
    log-probabilities for a slice of the same positions, at the objective's loss temperature. `denominator` is the number of
    counted positions of the whole optimiser step over all processes, so that no split into micro-batches or processes
    changes the gradient; with N = 0 the loss is exactly 0. `weight_N` multiplies each position's loss.

    Memory beyond the inputs: one gradient of the hidden states, one of the head where it trains, and a few tensors of
    (`chunk_positions`, V), by default about 32 MB each; the value and the gradients do not depend on it.
    """
    chunk_positions = chunk_positions or max(16, _CHUNK_NUMBERS // head.weight_VH.shape[0])
    divergences: list[Tensor] = []
    cross_entropies: list[Tensor] = []

    def position_loss(projected_NV: Tensor, chunk: slice) -> Tensor:
        logits_NV = head.transform(projected_NV)
        loss_N = logits_NV.new_zeros(logits_NV.shape[0], dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        if objective.divergence is not None:
            if teacher is None:
                raise ValueError("this objective has a divergence, so it needs a teacher signal")
            student_logp = _logp(logits_NV, objective.loss_temperature)
            divergence_N = objective.divergence(student_logp, teacher(chunk).to(student_logp))
            divergences.append(divergence_N.detach())
            loss_N = loss_N + divergence_N
        if objective.cross_entropy_weight:
            log_probs = _logp(logits_NV, 1.0)
            cross_entropy_N = -log_probs.gather(-1, token_ids_N[chunk, None])[:, 0]
            cross_entropies.append(cross_entropy_N.detach())
            loss_N = loss_N + objective.cross_entropy_weight * cross_entropy_N
        return loss_N if weight_N is None else loss_N * weight_N[chunk]

    # Inside the function gradients are always off, and a parameter asks for one even where the caller wants none.
    total: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH, head.weight_VH, head.bias_V, position_loss, chunk_positions, torch.is_grad_enabled()
    )
    report = Report()
    if divergences:
        report.divergence_N = torch.cat(divergences)
    if cross_entropies:
        report.cross_entropy_N = torch.cat(cross_entropies)
    return total / denominator, report
