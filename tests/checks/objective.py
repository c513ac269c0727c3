"""What every training loss must satisfy. A check takes the loss, and asserts.

Shape letters: B rows, T positions, V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn


class Loss(Protocol):
    """Forward KL to the teacher plus cross-entropy on the tokens, over `vocabulary_size` ids, / denominator."""

    def __call__(
        self,
        student_hidden_NH: Tensor,
        student: nn.Linear,
        teacher_hidden_NH: Tensor,
        teacher: nn.Linear,
        token_ids_N: Tensor,
        *,
        vocabulary_size: int,
        denominator: float,
        chunk_positions: int,
        cross_entropy_weight: float,
    ) -> Tensor: ...


@dataclass
class Positions:
    """N counted positions with the two heads that score them."""

    student_hidden_NH: Tensor
    student: nn.Linear
    teacher_hidden_NH: Tensor
    teacher: nn.Linear
    token_ids_N: Tensor

    @property
    def vocabulary_size(self) -> int:
        return min(self.student.out_features, self.teacher.out_features)

    def loss(self, loss: Loss, *, denominator: float, chunk: int = 7, cross_entropy_weight: float = 0.3) -> Tensor:
        return loss(
            self.student_hidden_NH,
            self.student,
            self.teacher_hidden_NH,
            self.teacher,
            self.token_ids_N,
            vocabulary_size=self.vocabulary_size,
            denominator=denominator,
            chunk_positions=chunk,
            cross_entropy_weight=cross_entropy_weight,
        )

    def part(self, chosen: slice) -> Positions:
        """Some of the positions, as a micro-batch under the same heads; gradients reach the same leaves."""
        return Positions(
            self.student_hidden_NH[chosen],
            self.student,
            self.teacher_hidden_NH[chosen],
            self.teacher,
            self.token_ids_N[chosen],
        )

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.student_hidden_NH, *self.student.parameters()], retain_graph=True))


def random_head(hidden: int, rows: int, *, seed: int, bias: bool = True) -> nn.Linear:
    head = nn.Linear(hidden, rows, bias=bias, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def random_positions(
    count: int = 50, *, rows: int = 29, hidden: int = 6, bias: bool = True, seed: int = 0
) -> Positions:
    generator = torch.Generator().manual_seed(seed)
    return Positions(
        torch.randn(count, hidden, generator=generator, dtype=torch.float64).requires_grad_(),
        random_head(hidden, rows, seed=seed + 1, bias=bias),
        torch.randn(count, hidden + 3, generator=generator, dtype=torch.float64),
        random_head(hidden + 3, rows, seed=seed + 2, bias=bias),
        torch.randint(rows, (count,), generator=generator),
    )


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    # float64: what remains is the order in which at most 50 positions are summed.
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def check_chunks(loss: Loss) -> None:
    """Every chunk size gives the same value and gradient: 1, sizes that leave a rest, primes, N, and more than N."""
    positions = random_positions(50)
    whole = positions.loss(loss, denominator=50, chunk=50)
    for chunk in (1, 2, 7, 8, 13, 49, 51, 1000):
        part = positions.loss(loss, denominator=50, chunk=chunk)
        assert_equal([part, *positions.gradients(part)], [whole, *positions.gradients(whole)])


def check_splits(loss: Loss) -> None:
    """A step split into micro-batches of very different sizes has the same gradient."""
    positions = random_positions(50)
    whole = positions.loss(loss, denominator=50)
    for bounds in ((0, 50), (0, 1, 50), (0, 3, 10, 47, 50), (0, 20, 20, 50)):
        losses = [positions.part(slice(start, stop)).loss(loss, denominator=50) for start, stop in pairwise(bounds)]
        total = torch.stack(losses).sum()
        assert_equal([total, *positions.gradients(total)], [whole, *positions.gradients(whole)])


def check_nothing_counted(loss: Loss) -> None:
    """A micro-batch in which every position is masked adds exactly 0 to value and gradients."""
    positions = random_positions(0)
    empty = positions.loss(loss, denominator=50)
    assert empty == 0
    for gradient in positions.gradients(empty):
        assert (gradient == 0).all()


def check_padded_vocabulary(loss: Loss) -> None:
    """The same model with a padded head, as teacher or as student, is 0 nats away from itself."""
    plain = random_positions(20)
    padded = random_head(6, 37, seed=5)
    with torch.no_grad():
        for parameter, own in zip(padded.parameters(), plain.student.parameters(), strict=True):
            parameter[:29] = own
    for student, teacher in ((plain.student, padded), (padded, plain.student)):
        hidden = plain.student_hidden_NH
        positions = Positions(hidden, student, hidden.detach(), teacher, plain.token_ids_N)
        value = positions.loss(loss, denominator=20, cross_entropy_weight=0.0)
        assert value.detach().abs() < 1e-13  # float64: products of two shapes may differ in their last bits


CHECKS: dict[str, Callable[[Loss], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (check_chunks, check_splits, check_nothing_counted, check_padded_vocabulary)
}


def check_counted_positions(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The counted positions are the response's tokens, each of them and no other.

    `loss` depends on last hidden states (B, T, H), token ids (B, T) and the mask of response tokens (B, T). Editing a counted
    token must change it, editing any other must not. Gradient must reach exactly the hidden states that predict a counted
    token, one position before it.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ids_BT = torch.randint(9, (2, 7), generator=generator)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    value = loss(hidden_BTH, ids_BT, mask_BT)
    for row in range(2):
        for position in range(7):
            edited = ids_BT.clone()
            edited[row, position] = (edited[row, position] + 1) % 9
            changed = bool(loss(hidden_BTH, edited, mask_BT) != value)
            assert changed == bool(mask_BT[row, position]), (row, position)
    (gradient,) = torch.autograd.grad(value, hidden_BTH)
    predicts_counted = torch.cat([mask_BT[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, predicts_counted)
