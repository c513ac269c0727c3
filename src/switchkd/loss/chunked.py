"""The sum over positions of a loss of their logits, made and differentiated a chunk at a time.

The logits never exist in full. Gradients are taken inside the chunk loop, so that nothing of size (N, V) is kept for the
backward pass: what stays is the gradient of the hidden states, and of the head if it trains. A chunk is large, for the sake
of its matrix products; the loss gets it in pieces, since it works with a dozen tensors of a piece's size.

Shape letters: N positions, C those of a chunk, P those of a piece, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchkd.models.heads import Head
from switchkd.models.memory import numbers_at_once

# The logits of a chunk hold at most this many numbers, 1 GB in float32, however much memory a device has: its matrix products
# are as fast as they get. On a CPU they hold 64 MB; with half as many, one on two cores is a third slower at 131,072 ids.
_MOST_NUMBERS = 1 << 28
# A CPU's caches want small tensors for the comparison, a GPU few kernels.
PIECES_OF_A_CHUNK_ON_CPU = 8

# The losses (P,) of the positions of a piece, from their projected hidden states (P, V), the piece and the chunk it lies in.
# The pieces of a chunk come in order.
PositionLoss = Callable[[Tensor, slice, slice], Tensor]


def chunked_sum(
    hidden_NH: Tensor, head: Head, position_loss: PositionLoss, chunk_positions: int | None = None
) -> Tensor:
    """The sum of `position_loss` over all positions, a scalar in at least float32; differentiable in states and head.

    `chunk_positions` None follows the device: chunks of 64 MB on a CPU, and on a GPU of what its free memory allows. Neither the
    value nor the gradients depend on it.
    """
    inputs = (hidden_NH, head.projection.weight, head.projection.bias)
    # Inside the function gradients are always off, and a parameter asks for one even if the caller wants none.
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    # Below 16 rows a matrix product spends its time reading the weight.
    device = hidden_NH.device
    chunk_positions = chunk_positions or max(16, min(numbers_at_once(device), _MOST_NUMBERS) // head.vocabulary_size)
    pieces = PIECES_OF_A_CHUNK_ON_CPU if device.type == "cpu" else 1
    work = _Work(position_loss, head.vocabulary_size, chunk_positions, max(1, chunk_positions // pieces), wanted)
    total: Tensor = _ChunkedSum.apply(*inputs, work)  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True)
class _Work:
    """Only the first `rows` of weight and bias take part; `wanted` says which of states, weight and bias get a gradient."""

    position_loss: PositionLoss
    rows: int
    chunk_positions: int
    piece_positions: int
    wanted: list[bool]


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: _Work) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        total, ctx.gradients = _sum_and_gradients(hidden_NH, weight_VH, bias_V, work)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not copied: the head's may be the largest tensor of a step. A second backward computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden_NH, weight_VH, bias_V = ctx.saved_tensors
            gradients = _sum_and_gradients(hidden_NH, weight_VH, bias_V, ctx.work)[1]
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_outputs[0].to(gradient.dtype))
        # Autograd casts those of weight and bias to the parameters' type.
        return (*gradients, None)


def _sum_and_gradients(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: _Work
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The sum and the gradients of states, weight and bias; those of weight and bias are whole, 0 beyond `rows`.

    Those of weight and bias are in at least float32: a sum over hundreds of chunks in 16 bits would lose the later ones.
    """
    total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    dtypes = [hidden_NH.dtype, *[torch.promote_types(weight_VH.dtype, torch.float32)] * 2]
    gradients = tuple(
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and wanted else None
        for tensor, dtype, wanted in zip((hidden_NH, weight_VH, bias_V), dtypes, work.wanted, strict=True)
    )
    hidden_grad, weight_grad, bias_grad = gradients
    training = any(work.wanted)
    weight = weight_VH.detach()[: work.rows].to(hidden_NH.dtype)
    bias = None if bias_V is None else bias_V.detach()[: work.rows].to(hidden_NH.dtype)
    for chunk in _slices(0, hidden_NH.shape[0], work.chunk_positions):
        hidden = hidden_NH.detach()[chunk]
        logits = torch.nn.functional.linear(hidden, weight, bias)
        for at in _slices(chunk.start, chunk.stop, work.piece_positions):
            piece = slice(at.start - chunk.start, at.stop - chunk.start)
            part = logits[piece].detach().requires_grad_(training)
            with torch.enable_grad():
                loss = work.position_loss(part, at, chunk).sum()
            total += loss.detach()
            if training:
                # In the place of the logits, which are not read again.
                logits[piece] = torch.autograd.grad(loss, part)[0]
        if hidden_grad is not None:
            # Under autocast the logits, and so their gradient, have a lower precision than the weight.
            hidden_grad[chunk] = logits.to(weight.dtype) @ weight
        if weight_grad is not None:
            _add_product_(weight_grad[: work.rows], logits.T, hidden)
        if bias_grad is not None:
            bias_grad[: work.rows] += logits.sum(dim=0, dtype=bias_grad.dtype)
        # This chunk's logits, before the next chunk's are made.
        del logits, part
    return total, gradients


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total of at least float32."""
    if left.dtype == torch.bfloat16:
        # Ten times as fast as in float32 where there are units for it, and rounded once a chunk.
        total += left @ right.to(left.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
