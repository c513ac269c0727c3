"""The training loss: counted positions -> a chunk at a time through both heads -> divergence -> sum / denominator.

Logits of neither model ever exist in full. The student's gradient is taken inside the chunk loop, so that nothing of
size (N, V) is kept for the backward pass: what stays is the gradient of the hidden states, and of the head where it trains.
A chunk is large, for its matrix products; its two distributions are compared a piece at a time, since that takes a dozen
tensors of a piece's size.

Masking, temperature, chunking and reduction live here and nowhere else.

Shape letters: N counted positions, C those of a chunk, P those of a piece, V vocabulary, H hidden, K ids kept, E events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.models.heads import Head

# A chunk's logits hold about this many numbers, 64 MB in float32: with half of them a matrix product on two cores is a
# third slower at 131,072 ids.
_CHUNK_NUMBERS = 1 << 24
_PIECES_OF_A_CHUNK = 8

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]
TrainOn = Literal["all", "student", "teacher"]


@dataclass(frozen=True)
class Objective:
    """What is minimised at each counted position, in nats.

    divergence(student, teacher) at `loss_temperature` + cross_entropy_weight * -log p_student(token). Without a
    `divergence` no teacher is asked. The loss temperature is not the sampling temperature, and has no effect on it;
    gradients are not rescaled by its square. The tokens of rollouts weigh what `token_weights` gives their writer.

    `teacher_text_divergence` takes the divergence's place at tokens that the teacher wrote (DistiLLM-2, arXiv 2503.07067).
    `long_term_weight` * return * -log p_student(token) is added where returns are given: their policy gradient
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

    def divergence_by_writer(self, student_logp: Tensor, teacher_logp: Tensor, by_teacher: Tensor | None) -> Tensor:
        """The divergence at each position, by who wrote its token (bool; None: nobody says, as in a data set's text)."""
        assert self.divergence is not None
        if self.teacher_text_divergence is None or by_teacher is None:
            return self.divergence(student_logp, teacher_logp)
        loss = student_logp.new_zeros(by_teacher.shape)
        # Each is asked at its own positions alone: elsewhere it may be infinite, and its gradient then NaN.
        for function, mask in ((self.divergence, ~by_teacher), (self.teacher_text_divergence, by_teacher)):
            loss = loss.masked_scatter(mask, function(student_logp[mask], teacher_logp[mask]))
        return loss

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

Comparison = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class TeacherSignal(Protocol):
    """What a teacher says at the counted positions, and between which events it can be compared with the student.

    Called with a chunk of the positions, it returns a comparison. That takes the student's log-probabilities (P, V) at a piece
    of the chunk, and returns those of the student and of the teacher, natural log, both (P, E) in the student's type and on its
    device, over the same E events. Gradients pass to the student's.
    """

    def __call__(self, chunk: slice) -> Comparison:
        """The comparison at these positions."""
        ...


def dense_teacher(hidden_NH: Tensor, head: Head, loss_temperature: float = 1.0) -> TeacherSignal:
    """The teacher's whole distributions, made from its hidden states a chunk at a time."""

    def at(chunk: slice) -> Comparison:
        with torch.no_grad():
            logits_CV = head(hidden_NH[chunk].to(head.weight_VH.device))
        return _whole(logits_CV, loss_temperature)

    return at


def logp_teacher(logp_NV: Tensor, loss_temperature: float = 1.0) -> TeacherSignal:
    """The teacher's whole distributions, kept as log-probabilities (N, V) at temperature 1."""
    return lambda chunk: _whole(logp_NV[chunk].detach(), loss_temperature)


def _whole(logits_CV: Tensor, loss_temperature: float) -> Comparison:
    def compare(student_logp_PV: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        return student_logp_PV, _logp(logits_CV[piece].to(student_logp_PV.device), loss_temperature).to(student_logp_PV)

    return compare


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

    def compare(chunk: slice, student_logp_PV: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        ids_PK = ids_NK[chunk][piece].to(student_logp_PV.device)
        teacher_logp_PK = logp_NK[chunk][piece].detach().to(student_logp_PV)
        student_logp_PK = student_logp_PV.gather(-1, ids_PK)
        if ids_PK.shape[-1] == student_logp_PV.shape[-1]:
            return student_logp_PK, teacher_logp_PK
        if rest_logp_N is None:
            teacher_rest_P = (1 - teacher_logp_PK.exp().sum(dim=-1)).clamp(min=0).log()
        else:
            teacher_rest_P = rest_logp_N[chunk][piece].detach().to(student_logp_PV)
        lift = student_logp_PV.new_tensor(torch.finfo(student_logp_PV.dtype).eps).log()
        teacher_rest_P = torch.logaddexp(teacher_rest_P, lift)
        # The lift takes the place of the first of the K ids, and nothing those of the others.
        instead_PK = torch.full_like(student_logp_PK, -torch.inf)
        instead_PK[:, 0] = lift
        student_rest_P = student_logp_PV.scatter(-1, ids_PK, instead_PK).logsumexp(dim=-1)
        return (
            torch.cat([student_logp_PK, student_rest_P[:, None]], dim=-1),
            torch.cat([teacher_logp_PK, teacher_rest_P[:, None]], dim=-1),
        )

    return lambda chunk: partial(compare, chunk)


def _logp(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in nats, at least float32."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
    # log_softmax adds up one by one on a CPU, which at 131,072 ids costs 1.5e-5 of the gradient; this costs 2e-6.
    return logits_NV - logits_NV.logsumexp(dim=-1, keepdim=True)


# -------------------------------------------------------------------------------------------------------------- the loss


# Of a chunk: the loss of each position of a piece of it, from its projected hidden states.
ChunkLoss = Callable[[slice], Callable[[Tensor, slice], Tensor]]


class _ChunkedSum(torch.autograd.Function):
    """Sum of a per-position loss of the projected hidden states, with the gradients taken chunk by chunk.

    Of the head's weight and bias only the first `rows` take part; their gradients are of the whole, and 0 elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        rows: int,
        chunk_loss: ChunkLoss,
        chunk_positions: int,
        training: bool,
    ) -> Tensor:
        inputs = (hidden_NH, weight_VH, bias_V)
        wanted = [training and tensor is not None and tensor.requires_grad for tensor in inputs]
        ctx.settings = (rows, chunk_loss, chunk_positions, wanted)
        total, ctx.gradients = _sum_and_gradients(inputs, *ctx.settings)
        ctx.save_for_backward(*inputs)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not copied: the head's may be the largest tensor of a step. A second backward takes them anew.
        gradients = ctx.gradients or _sum_and_gradients(ctx.saved_tensors, *ctx.settings)[1]
        ctx.gradients = None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_outputs[0].to(gradient.dtype))
        return (*gradients, None, None, None, None)


def _sum_and_gradients(
    inputs: Sequence[Tensor | None],
    rows: int,
    chunk_loss: ChunkLoss,
    chunk_positions: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    hidden_NH, weight_VH, bias_V = inputs
    assert hidden_NH is not None
    assert weight_VH is not None
    total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    gradients = tuple(
        torch.zeros_like(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    )
    hidden_grad, weight_grad, bias_grad = gradients
    weight = weight_VH.detach()[:rows].to(hidden_NH.dtype)
    bias = None if bias_V is None else bias_V.detach()[:rows].to(hidden_NH.dtype)
    for chunk in _slices(hidden_NH.shape[0], chunk_positions):
        hidden = hidden_NH.detach()[chunk]
        logits = torch.nn.functional.linear(hidden, weight, bias)
        position_loss = chunk_loss(chunk)
        for piece in _slices(hidden.shape[0], max(1, chunk_positions // _PIECES_OF_A_CHUNK)):
            part = logits[piece].detach().requires_grad_(any(wanted))
            with torch.enable_grad():
                loss = position_loss(part, piece).sum()
            total += loss.detach()
            if any(wanted):
                # In the place of the logits, which nobody reads again.
                logits[piece] = torch.autograd.grad(loss, part)[0]
        if hidden_grad is not None:
            # Under autocast the logits, and so their gradient, are of a lower precision than the weight.
            hidden_grad[chunk] = logits.to(weight.dtype) @ weight
        if weight_grad is not None:
            weight_grad[:rows].addmm_(logits.T.to(weight_grad.dtype), hidden.to(weight_grad.dtype))
        if bias_grad is not None:
            bias_grad[:rows] += logits.sum(dim=0)
        # Both models' logits, before the next chunk's are made.
        del logits, part, position_loss
    return total, gradients


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@dataclass
class _Positions:
    """The counted positions of a loss, what each adds to it, and what has been measured of them."""

    head: Head
    objective: Objective
    teacher: TeacherSignal | None
    token_ids_N: Tensor
    weight_N: Tensor | None
    written_by_teacher_N: Tensor | None
    return_N: Tensor | None
    measure: bool
    measured: dict[str, Tensor] = field(default_factory=dict)

    def chunk_loss(self, chunk: slice) -> Callable[[Tensor, slice], Tensor]:
        """As `ChunkLoss`."""
        if self.objective.divergence is None:
            return partial(self._loss, chunk, None)
        if self.teacher is None:
            raise ValueError("this objective has a divergence, so it needs a teacher signal")
        return partial(self._loss, chunk, self.teacher(chunk))

    def _loss(self, chunk: slice, compare: Comparison | None, projected_PV: Tensor, piece: slice) -> Tensor:
        at = slice(chunk.start + piece.start, chunk.start + piece.stop)
        logits_PV = self.head.transform(projected_PV)
        loss_P = logits_PV.new_zeros(logits_PV.shape[0], dtype=torch.promote_types(logits_PV.dtype, torch.float32))
        if compare is not None:
            loss_P = self._divergence(at, *compare(_logp(logits_PV, self.objective.loss_temperature), piece))
        if self.objective.cross_entropy_weight or self.return_N is not None:
            cross_entropy_P = -_logp(logits_PV, 1.0).gather(-1, self.token_ids_N[at, None])[:, 0]
            self._keep("cross_entropy_N", at, cross_entropy_P)
            returns = 0.0 if self.return_N is None else self.return_N[at].to(cross_entropy_P)
            factor = self.objective.cross_entropy_weight + self.objective.long_term_weight * returns
            loss_P = loss_P + factor * cross_entropy_P
        return loss_P if self.weight_N is None else loss_P * self.weight_N[at]

    def _divergence(self, at: slice, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        by_teacher_P = None if self.written_by_teacher_N is None else self.written_by_teacher_N[at]
        divergence_P = self.objective.divergence_by_writer(student_logp, teacher_logp, by_teacher_P)
        self._keep("divergence_N", at, divergence_P)
        if self.measure:
            self._keep("student_entropy_N", at, _entropy(student_logp.detach()))
            self._keep("teacher_entropy_N", at, _entropy(teacher_logp))
            self._keep("agreement_N", at, student_logp.argmax(dim=-1) == teacher_logp.argmax(dim=-1))
        return divergence_P

    def _keep(self, name: str, at: slice, values_P: Tensor) -> None:
        # Made once: small tensors left between the large ones of each piece would keep a CPU's memory from being used again.
        if name not in self.measured:
            self.measured[name] = values_P.new_empty(self.token_ids_N.shape)
        self.measured[name][at] = values_P.detach()


def distillation_loss(
    student_hidden_NH: Tensor,
    head: Head,
    token_ids_N: Tensor,
    objective: Objective,
    *,
    teacher: TeacherSignal | None,
    denominator: Tensor | float,
    weight_N: Tensor | None = None,
    written_by_teacher_N: Tensor | None = None,
    return_N: Tensor | None = None,
    measure: bool = False,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Report]:
    """The loss (a scalar in nats: sum over the N counted positions / `denominator`) and its per-position report.

    `student_hidden_NH` are the student's last hidden states that predict `token_ids_N`; `teacher` is what the teacher says
    at the same positions, at the objective's loss temperature. `denominator` is the number of counted positions (with a
    weight other than 0) of the whole optimiser step over all processes, so that no split into micro-batches or processes
    changes the gradient; with N = 0 the loss is exactly 0. `weight_N` multiplies each position's loss, not its report.
    `written_by_teacher_N` (bool) selects the divergence where there are two; `return_N` is the long-term term's return in nats.
    `measure` adds entropies and agreement to the report, at the cost of a few passes over each chunk.

    Memory beyond the inputs: one gradient of the hidden states, one of the head where it trains, two tensors of
    (`chunk_positions`, V), by default about 64 MB each, and a dozen of an eighth of that; neither the value nor the gradients
    depend on it.
    """
    chunk_positions = chunk_positions or max(16, _CHUNK_NUMBERS // head.vocabulary_size)
    positions = _Positions(
        head, objective, teacher, token_ids_N, weight_N, written_by_teacher_N, return_N, measure=measure
    )
    # Inside the function gradients are always off, and a parameter asks for one even where the caller wants none.
    total: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH,
        head.projection.weight,
        head.projection.bias,
        head.vocabulary_size,
        positions.chunk_loss,
        chunk_positions,
        torch.is_grad_enabled(),
    )
    return total / denominator, Report(**positions.measured)


def _entropy(logp: Tensor) -> Tensor:
    """In nats; an excluded id has no part in it."""
    entropy: Tensor = torch.special.entr(logp.exp()).sum(dim=-1)
    return entropy
