"""What every divergence has to satisfy. A check takes the implementation and the reference, and asserts.

Shape letters: N distributions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reference.divergences import GRADIENTS, HELD_WEIGHTS, NOT_SMOOTH, VALUES, Distribution
from switchkd.distributions.divergences import DIVERGENCE, Divergence

DivergenceFunction = Callable[[Tensor, Tensor], Tensor]


def divergence_named(name: str, **settings: float) -> Divergence:
    return DIVERGENCE.make({"name": name, **settings})


SHAPES = ((), (1,), (7,), (2, 3))
VOCABULARIES = (1, 2, 3, 17, 151)


@dataclass(frozen=True)
class Reference:
    """The definition's value and gradient with respect to the student's logits, for one pair of distributions.

    `smooth` is False where the gradient jumps at equality, `exact_gradient` where it is by definition not the value's.
    """

    value: Callable[[Distribution, Distribution], float]
    gradient: Callable[[Distribution, Distribution], np.ndarray]
    smooth: bool = True
    exact_gradient: bool = True

    @classmethod
    def named(cls, name: str, **settings: float) -> Reference:
        value, gradient = partial(VALUES[name], **settings), partial(GRADIENTS[name], **settings)
        return cls(value, gradient, smooth=name not in NOT_SMOOTH, exact_gradient=name not in HELD_WEIGHTS)

    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return self._each(lambda s, t: [self.value(s, t)], student_logp, teacher_logp).reshape(student_logp.shape[:-1])

    def gradients(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return self._each(lambda s, t: self.gradient(s, t).tolist(), student_logp, teacher_logp).reshape(
            student_logp.shape
        )

    def _each(
        self,
        function: Callable[[list[float], list[float]], Sequence[float]],
        student_logp: Tensor,
        teacher_logp: Tensor,
    ) -> Tensor:
        vocabulary = student_logp.shape[-1]
        students, teachers = (
            logp.detach().double().exp().reshape(-1, vocabulary) for logp in (student_logp, teacher_logp)
        )
        rows = [function(s, t) for s, t in zip(students.tolist(), teachers.tolist(), strict=True)]
        return torch.tensor(rows, dtype=torch.float64)


def random_logits(
    shape: tuple[int, ...], *, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher, leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def logp(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def check_values(divergence: DivergenceFunction, reference: Reference) -> None:
    """The definition's value over odd shapes, in both precisions, for flat and for very peaked distributions."""
    # float64: roundings of V terms. float32: log-probabilities of up to 150 nats have an error of 150 * 2^-24 = 1e-5.
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        for scale in (0.5, 2.0, 30.0):
            for shape in SHAPES:
                for vocabulary in VOCABULARIES:
                    student, teacher = map(logp, random_logits((*shape, vocabulary), scale=scale, dtype=dtype))
                    value = divergence(student, teacher)
                    assert value.shape == shape
                    assert value.dtype == dtype
                    expected = reference.values(student, teacher)
                    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


def check_gradients(divergence: DivergenceFunction, reference: Reference) -> None:
    """The definition's gradient with respect to the student's logits."""
    for vocabulary in VOCABULARIES:
        student, teacher = random_logits((3, vocabulary))
        divergence(logp(student), logp(teacher)).sum().backward()
        expected = reference.gradients(logp(student), logp(teacher))
        torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-12)  # float64, up to 151 terms


def check_finite_differences(divergence: DivergenceFunction, reference: Reference) -> None:
    """The gradient for both models is that of the value, where it is meant to be."""
    if not reference.exact_gradient:
        return
    student, teacher = random_logits((2, 5))
    # gradcheck steps by 1e-6: no kink is that near.
    assert ((logp(student) - logp(teacher)).abs() > 1e-3).all()
    assert torch.autograd.gradcheck(
        lambda s, t: divergence(logp(s), logp(t)), (student, teacher), raise_exception=False
    )


def check_zero_at_equality(divergence: DivergenceFunction, reference: Reference) -> None:
    """Exactly 0, with a gradient of 0, where the two distributions are the same numbers."""
    for dtype in (torch.float32, torch.float64):
        student, _ = random_logits((20, 31), dtype=dtype)
        value = divergence(logp(student), logp(student.detach()))
        assert (value == 0).all()
        value.sum().backward()
        assert (student.grad.abs() <= 4 * torch.finfo(dtype).eps).all()  # p - p through a softmax


def check_positive_otherwise(divergence: DivergenceFunction, reference: Reference) -> None:
    for dtype in (torch.float32, torch.float64):
        for scale in (0.1, 2.0, 30.0):
            assert (divergence(*map(logp, random_logits((200, 23), scale=scale, dtype=dtype))) > 0).all()


def check_near_equality(divergence: DivergenceFunction, reference: Reference) -> None:
    """Where rounding drowns the value it may be 0 but not negative, and a smooth gradient still points the right way."""
    student, _ = random_logits((200, 100), dtype=torch.float32)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    teacher = (student + 3e-4 * noise).detach()
    value = divergence(logp(student), logp(teacher))
    assert (value >= 0).all()
    value.sum().backward()
    assert student.grad.isfinite().all()
    if not reference.smooth:
        return
    expected = reference.gradients(logp(student.double()), logp(teacher.double()))
    error = (student.grad - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The log-ratio of 3e-4 carries a few roundings of log-probabilities, 5e-7 each; the KL to a mixture of which 0.9 are
    # the distribution itself sees a tenth of that ratio beside the same roundings. A gradient of 0 has an error of 1.
    assert error.max() < 0.2


def check_excluded_in_both(divergence: DivergenceFunction, reference: Reference) -> None:
    """Ids that both exclude change neither value nor gradient, and make neither infinite."""
    kept = torch.tensor([True, False, True, True, False, True, True, False])
    logits = random_logits((9, 8))
    small = [full.detach()[:, kept].requires_grad_() for full in logits]
    value = divergence(*(logp(full.masked_fill(~kept, -torch.inf)) for full in logits))
    expected = divergence(*map(logp, small))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)  # the order of a sum of 8
    value.sum().backward()
    expected.sum().backward()
    for full, smaller in zip(logits, small, strict=True):
        assert full.grad.isfinite().all()
        assert (full.grad[:, ~kept] == 0).all()
        torch.testing.assert_close(full.grad[:, kept], smaller.grad, rtol=1e-12, atol=1e-14)


def check_excluded_in_one(divergence: DivergenceFunction, reference: Reference) -> None:
    """Where only one excludes an id, as under top-k sampling: the definition's value, +inf included, and never NaN.

    At a scale of 300 probabilities underflow to 0 in float32, which excludes an id in effect.
    """
    # As in check_values; and from log-probabilities of 1500 nats, 1500 * 2^-24 = 1e-4.
    for dtype, scale, tolerance in (
        (torch.float64, 2.0, 1e-11),
        (torch.float32, 2.0, 2e-5),
        (torch.float32, 300.0, 2e-4),
    ):
        for excludes_student, excludes_teacher in ((True, False), (False, True), (True, True)):
            logits = random_logits((9, 12), scale=scale, dtype=dtype)
            student_kept, teacher_kept = (
                torch.rand(9, 12, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in (0, 1)
            )
            # Something is left of each, and the likeliest ids differ.
            student_kept[:, 0] = teacher_kept[:, 1] = True
            student = logp(logits[0].masked_fill(~student_kept & excludes_student, -torch.inf))
            teacher = logp(logits[1].masked_fill(~teacher_kept & excludes_teacher, -torch.inf))
            value = divergence(student, teacher)
            expected = reference.values(student, teacher)
            assert not value.isnan().any()
            # The reference still has a probability where float32 has 0, and may make an infinity of it.
            assert (value.isinf() == expected.isinf()).all() or scale == 300.0
            finite = value.isfinite() & expected.isfinite()
            torch.testing.assert_close(value[finite].double(), expected[finite], rtol=tolerance, atol=tolerance)
            if finite.any():
                value[finite].sum().backward()
                assert all(each.grad[finite].isfinite().all() for each in logits)


def check_permutation(divergence: DivergenceFunction, reference: Reference) -> None:
    student, teacher = map(logp, random_logits((5, 40)))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = divergence(student[:, order], teacher[:, order])
    torch.testing.assert_close(
        permuted, divergence(student, teacher), rtol=1e-12, atol=1e-14
    )  # the order of a sum of 40


CHECKS: dict[str, Callable[[DivergenceFunction, Reference], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_values,
        check_gradients,
        check_finite_differences,
        check_zero_at_equality,
        check_positive_otherwise,
        check_near_equality,
        check_excluded_in_both,
        check_excluded_in_one,
        check_permutation,
    )
}
