"""The chunked loss against a dense one under plain autograd, and the conformance checks of `checks.objective`.

Shape letters: V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checks.divergence import divergence_named
from checks.objective import CHECKS, Positions, assert_equal, random_head, random_positions
from reference.objective import dense_loss
from switchkd.distributions.divergences import ForwardKL
from switchkd.loss.objective import Counted, DivergenceFunction, Objective, Report, distillation_loss
from switchkd.loss.signals import DenseTeacher
from switchkd.models.heads import Head


def unchanged(logits: Tensor) -> Tensor:
    return logits


def head_of(projection: nn.Linear, vocabulary_size: int | None = None) -> Head:
    return Head(projection, vocabulary_size or projection.out_features, unchanged)


def our_loss(
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
) -> Tensor:
    """Ours, as `checks.objective` calls a loss."""
    loss, _ = distillation_loss(
        Counted(student_hidden_NH, token_ids_N),
        head_of(student, vocabulary_size),
        Objective(ForwardKL(), cross_entropy_weight),
        teacher=DenseTeacher(teacher_hidden_NH, head_of(teacher, vocabulary_size)),
        denominator=denominator,
        chunk_positions=chunk_positions,
    )
    return loss


def ours(
    positions: Positions,
    *,
    divergence: str | DivergenceFunction | None = "forward_kl",
    denominator: Tensor | float = 50.0,
    weight_N: Tensor | None = None,
    chunk_positions: int | None = None,
    **settings: float,
) -> tuple[Tensor, Report]:
    """Loss and report for `positions`; the settings are the objective's."""
    function = divergence_named(divergence) if isinstance(divergence, str) else divergence
    objective = Objective(function, **settings)
    teacher = DenseTeacher(positions.teacher_hidden_NH, head_of(positions.teacher), objective.loss_temperature)
    return distillation_loss(
        Counted(positions.student_hidden_NH, positions.token_ids_N, weight_N),
        head_of(positions.student),
        objective,
        teacher=None if divergence is None else teacher,
        denominator=denominator,
        chunk_positions=chunk_positions,
    )


def dense(
    positions: Positions, *, divergence: str | None = "forward_kl", denominator: float = 50.0, **options: Any
) -> Tensor:
    """The reference's loss for `positions`."""
    return dense_loss(
        positions.student(positions.student_hidden_NH),
        positions.teacher(positions.teacher_hidden_NH),
        positions.token_ids_N,
        divergence=divergence,
        denominator=denominator,
        **options,
    )


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str) -> None:
    CHECKS[check](our_loss)


# ------------------------------------------------------------------------------------------------- value and gradients

LOSSES = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jensen_shannon": {"divergence": "jensen_shannon"},
    "cross-entropy": {"divergence": None, "cross_entropy_weight": 1.0},
    "mixed": {"divergence": "forward_kl", "cross_entropy_weight": 0.5},
    "hot": {"divergence": "reverse_kl", "loss_temperature": 2.5},
    "hot and mixed": {"divergence": "jensen_shannon", "loss_temperature": 0.4, "cross_entropy_weight": 2.0},
}


@pytest.mark.parametrize("options", list(LOSSES.values()), ids=list(LOSSES))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 50, 99, None])
def test_value_and_every_gradient_equal_dense_autograd(options: dict[str, Any], bias: bool, chunk: int | None) -> None:
    positions = random_positions(50, bias=bias)
    expected = dense(positions, **options)
    value, _ = ours(positions, chunk_positions=chunk, **options)
    assert_equal([value, *positions.gradients(value)], [expected, *positions.gradients(expected)])


@given(
    count=st.integers(1, 12), rows=st.integers(1, 9), hidden=st.integers(1, 5), chunk=st.integers(1, 15),
    options=st.sampled_from(list(LOSSES.values())), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_size_equals_dense_autograd(
    count: int, rows: int, hidden: int, chunk: int, options: dict[str, Any], seed: int
) -> None:
    positions = random_positions(count, rows=rows, hidden=hidden, seed=seed)
    expected = dense(positions, **options)
    value, _ = ours(positions, chunk_positions=chunk, **options)
    assert_equal([value, *positions.gradients(value)], [expected, *positions.gradients(expected)])


def test_the_gradient_is_that_of_finite_differences() -> None:
    positions = random_positions(5, rows=7, hidden=3)
    weight, bias = positions.student.weight, positions.student.bias

    def loss(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        projection = nn.Linear(3, 7, device="meta", dtype=torch.float64)
        projection.register_parameter("weight", None)
        projection.register_parameter("bias", None)
        projection.weight, projection.bias = weight_VH, bias_V
        return ours(Positions(hidden_NH, projection, *teacher), cross_entropy_weight=0.3, chunk_positions=2)[0]

    teacher = positions.teacher_hidden_NH, positions.teacher, positions.token_ids_N
    assert torch.autograd.gradcheck(loss, (positions.student_hidden_NH, weight, bias))


def test_a_tied_weight_gets_the_gradients_of_both_its_uses() -> None:
    positions = random_positions(50, hidden=6, bias=False)
    weight = positions.student.weight

    def embedded() -> Positions:
        hidden_NH = torch.tanh(nn.functional.embedding(positions.token_ids_N, weight))
        return dataclasses.replace(positions, student_hidden_NH=hidden_NH)

    (gradient,) = torch.autograd.grad(ours(embedded(), chunk_positions=7)[0], weight)
    (expected,) = torch.autograd.grad(dense(embedded()), weight)
    assert_equal([gradient], [expected])


@pytest.mark.parametrize("transform", [lambda x: 5 * torch.tanh(x / 5), lambda x: x * 0.3], ids=["softcap", "scale"])
def test_the_family_s_own_transform_of_the_logits_is_part_of_the_loss(transform: Any) -> None:
    positions = random_positions(50)
    student = Head(positions.student, 29, transform)
    teacher = Head(positions.teacher, 29, transform)
    value, _ = distillation_loss(
        Counted(positions.student_hidden_NH, positions.token_ids_N),
        student,
        Objective(ForwardKL(), 0.5),
        teacher=DenseTeacher(positions.teacher_hidden_NH, teacher),
        denominator=50,
        chunk_positions=8,
    )
    expected = dense_loss(
        transform(positions.student(positions.student_hidden_NH)),
        transform(positions.teacher(positions.teacher_hidden_NH)),
        positions.token_ids_N,
        divergence="forward_kl",
        denominator=50,
        cross_entropy_weight=0.5,
    )
    assert_equal([value, *positions.gradients(value)], [expected, *positions.gradients(expected)])


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    positions = random_positions(50)
    (expected,) = torch.autograd.grad(dense(positions), positions.student_hidden_NH)
    positions.student.requires_grad_(False)
    value, _ = ours(positions, chunk_positions=7)
    value.backward()
    assert positions.student.weight.grad is None
    assert_equal([positions.student_hidden_NH.grad], [expected])


def test_frozen_hidden_states_leave_the_head_its_gradient() -> None:
    positions = random_positions(50)
    expected = torch.autograd.grad(dense(positions), list(positions.student.parameters()))
    positions.student_hidden_NH = positions.student_hidden_NH.detach()
    value, _ = ours(positions, chunk_positions=7)
    assert_equal(list(torch.autograd.grad(value, list(positions.student.parameters()))), list(expected))


def test_the_teacher_gets_no_gradient() -> None:
    positions = random_positions(50)
    positions.teacher_hidden_NH.requires_grad_()
    value, _ = ours(positions, chunk_positions=7)
    value.backward()
    assert positions.teacher_hidden_NH.grad is None
    assert all(parameter.grad is None for parameter in positions.teacher.parameters())


def test_evaluation_makes_no_gradients_and_gives_the_same_value() -> None:
    positions = random_positions(50)
    expected, _ = ours(positions)
    tracked: list[bool] = []

    def divergence(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        tracked.append(student_logp.requires_grad)
        return ForwardKL()(student_logp, teacher_logp)

    with torch.no_grad():
        value, _ = ours(positions, divergence=divergence)
    assert torch.equal(value, expected)
    assert tracked == [False]


@pytest.mark.parametrize("scale", [1.0, 3.0, -0.5])
def test_gradients_scale_with_what_follows_the_loss(scale: float) -> None:
    """Gradient scalers and means over processes multiply the loss."""
    positions = random_positions(20)
    value, _ = ours(positions)
    plain = positions.gradients(value)
    again, _ = ours(positions)
    assert_equal(positions.gradients(again * scale), [gradient * scale for gradient in plain])


# ------------------------------------------------------------------------------------------------ what is reduced, and how


@pytest.mark.parametrize("denominator", [1.0, 7, 50.0, torch.tensor(80), torch.tensor(80.0)])
def test_the_sum_is_divided_by_the_given_denominator(denominator: Tensor | float) -> None:
    positions = random_positions(50)
    value, _ = ours(positions, denominator=denominator)
    expected = dense(positions, denominator=float(denominator))
    assert_equal([value, *positions.gradients(value)], [expected, *positions.gradients(expected)])


def test_a_weight_multiplies_each_position_s_loss() -> None:
    positions = random_positions(50)
    weight_N = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight_N[::5] = 0
    value, report = ours(positions, weight_N=weight_N, cross_entropy_weight=0.5, chunk_positions=7)
    expected = dense(positions, weight_N=weight_N, cross_entropy_weight=0.5)
    assert_equal([value, *positions.gradients(value)], [expected, *positions.gradients(expected)])
    unweighted, plain = ours(positions, cross_entropy_weight=0.5)
    assert unweighted != value
    torch.testing.assert_close(report.divergence_N, plain.divergence_N, rtol=1e-12, atol=1e-14)  # chunks of a product


def test_the_report_holds_each_position_in_order() -> None:
    positions = random_positions(50)
    value, report = ours(positions, cross_entropy_weight=0.5, chunk_positions=7, denominator=1.0)
    assert report.divergence_N.shape == report.cross_entropy_N.shape == (50,)
    assert not report.divergence_N.requires_grad
    for index in (0, 6, 7, 49):
        alone = positions.part(slice(index, index + 1))
        assert_equal([report.divergence_N[index]], [dense(alone, denominator=1.0)])
        expected = dense(alone, divergence=None, cross_entropy_weight=1.0, denominator=1.0)
        assert_equal([report.cross_entropy_N[index]], [expected])
    assert_equal([(report.divergence_N + 0.5 * report.cross_entropy_N).sum()], [value])


def test_the_report_is_empty_where_nothing_is_measured() -> None:
    positions = random_positions(50)
    assert ours(positions)[1].cross_entropy_N.shape == (0,)
    assert ours(positions, divergence=None, cross_entropy_weight=1.0)[1].divergence_N.shape == (0,)


class Refusing:
    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"the teacher was asked at {at}")


def test_no_teacher_is_asked_without_a_divergence() -> None:
    positions = random_positions(50)
    counted = Counted(positions.student_hidden_NH, positions.token_ids_N)
    for divergence in (None, ForwardKL()):
        objective = Objective(divergence, cross_entropy_weight=1.0)
        with nullcontext() if divergence is None else pytest.raises(AssertionError, match="was asked"):
            distillation_loss(counted, head_of(positions.student), objective, teacher=Refusing(), denominator=50)


@pytest.mark.parametrize("count", [0, 5])
def test_a_divergence_without_a_teacher_is_refused(count: int) -> None:
    positions = random_positions(count)
    counted, objective = (
        Counted(positions.student_hidden_NH, positions.token_ids_N),
        Objective(ForwardKL()),
    )
    with pytest.raises(ValueError, match="needs a teacher"):
        distillation_loss(counted, head_of(positions.student), objective, teacher=None, denominator=5)


# ------------------------------------------------------------------------------------------------- vocabulary and types


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_the_surplus_rows_of_a_padded_head_have_no_part_in_the_loss(padded: str) -> None:
    positions = random_positions(50)
    expected = dense(positions, cross_entropy_weight=0.5)
    expected_gradients = positions.gradients(expected)
    small = getattr(positions, padded)
    large = random_head(small.in_features, 41, seed=9)
    with torch.no_grad():
        large.weight[:29], large.bias[:29] = small.weight, small.bias
    setattr(positions, padded, large)
    value = positions.loss(our_loss, denominator=50, cross_entropy_weight=0.5)
    gradients = positions.gradients(value)
    assert_equal([value, *(gradient[:29] for gradient in gradients[1:])], [expected, *expected_gradients[1:]])
    assert_equal(gradients[:1], expected_gradients[:1])
    for gradient in gradients[1:]:
        assert (gradient[29:] == 0).all()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gives_float32_losses_near_the_exact_one(
    hidden_dtype: torch.dtype, head_dtype: torch.dtype
) -> None:
    exact = random_positions(200)
    expected = dense(exact, cross_entropy_weight=0.5, denominator=200)
    low = Positions(
        exact.student_hidden_NH.detach().to(hidden_dtype).requires_grad_(),
        random_head(6, 29, seed=1).to(head_dtype),
        exact.teacher_hidden_NH.to(head_dtype),
        random_head(9, 29, seed=2).to(head_dtype),
        exact.token_ids_N,
    )
    value, report = ours(low, cross_entropy_weight=0.5, denominator=200, chunk_positions=17)
    assert value.dtype == report.divergence_N.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of about 3 are off by 0.01, losses of about 5 nats by as much, its mean by less.
    tolerance = 2e-2 if torch.bfloat16 in (hidden_dtype, head_dtype) else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    for gradient, exact_gradient in zip(low.gradients(value), exact.gradients(expected), strict=True):
        error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
        assert error < tolerance


def test_under_autocast_the_loss_is_near_the_exact_one() -> None:
    """`bf16=True` of transformers: weights stay float32, products are made in bfloat16."""
    exact = random_positions(200)
    expected = dense(exact, cross_entropy_weight=0.5, denominator=200)
    single = Positions(
        exact.student_hidden_NH.detach().float().requires_grad_(),
        random_head(6, 29, seed=1).float(),
        exact.teacher_hidden_NH.float(),
        random_head(9, 29, seed=2).float(),
        exact.token_ids_N,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = ours(single, cross_entropy_weight=0.5, denominator=200, chunk_positions=17)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-2, atol=0)  # 8 bits, as above
    for gradient, exact_gradient in zip(single.gradients(value), exact.gradients(expected), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - exact_gradient).norm() / exact_gradient.norm() < 2e-2


# ------------------------------------------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation inside gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("options", list(LOSSES.values()), ids=list(LOSSES))
def test_logits_of_neither_model_ever_exist_in_full(options: dict[str, Any]) -> None:
    count, rows, hidden, chunk = 300, 400, 6, 10
    positions = random_positions(count, rows=rows, hidden=hidden)
    kept: list[int] = []
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            value, _ = ours(positions, chunk_positions=chunk, **options)
        value.backward()
    # The inputs themselves, one chunk's logits, or the gradient of a weight: never N x V = 120,000 numbers.
    assert largest.numbers == max(chunk * rows, rows * hidden, count * hidden) == 4000
    assert max(kept) <= 4000


def test_by_default_a_chunk_is_bounded_however_large_the_vocabulary() -> None:
    seen: list[int] = []

    def divergence(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        seen.append(student_logp.shape[0])
        return (student_logp - teacher_logp).square().sum(dim=-1)

    positions = random_positions(250, rows=40_000, hidden=2)
    with torch.no_grad():
        ours(positions, divergence=divergence)
    assert sum(seen) == 250
    assert max(seen) * 40_000 <= 1 << 23


def test_one_chunk_of_the_teacher_s_logits_is_in_memory_at_a_time() -> None:
    positions = random_positions(43)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def of_teacher(logits_CV: Tensor) -> Tensor:
        made.append(weakref.ref(logits_CV))
        return logits_CV

    def of_student(logits_PV: Tensor) -> Tensor:
        alive.append(sum(each() is not None for each in made))
        return logits_PV

    teacher = DenseTeacher(positions.teacher_hidden_NH, Head(positions.teacher, 29, of_teacher))
    counted, objective = Counted(positions.student_hidden_NH, positions.token_ids_N), Objective(ForwardKL())
    head = Head(positions.student, 29, of_student)
    distillation_loss(counted, head, objective, teacher=teacher, denominator=1, chunk_positions=16)
    # Chunks of 16, 16 and 11 in pieces of 2: made at the first piece of a chunk, gone after its last.
    assert alive == [0, *[1] * 7, 0, *[1] * 7, 0, *[1] * 5]
    assert [each() for each in made] == [None, None, None]


def test_going_back_once_more_gives_the_same_gradients() -> None:
    positions = random_positions()
    loss, _ = ours(positions)
    inputs = (positions.student_hidden_NH, positions.student.weight)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [each.clone() for each in first]
    second = torch.autograd.grad(3 * loss, inputs)
    for once, still, again in zip(kept, first, second, strict=True):
        assert torch.equal(once, still)
        assert_equal(again, 3 * once)


def test_the_head_has_one_gradient_only_in_memory() -> None:
    """The largest tensor of a step: handed to the parameter as it was made, with no copy for scaling or padding rows."""
    positions = random_positions()
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.shape == positions.student.weight.shape:
                    made.append(leaf.untyped_storage().data_ptr())
            return out

    vocabulary_size = positions.student.out_features - 1
    positions.student.weight.grad = None
    weight = positions.student.weight.untyped_storage().data_ptr()
    teacher = DenseTeacher(positions.teacher_hidden_NH, head_of(positions.teacher, vocabulary_size))
    counted = Counted(positions.student_hidden_NH, positions.token_ids_N.clamp(max=vocabulary_size - 1))
    with Watch():
        loss, _ = distillation_loss(
            counted,
            head_of(positions.student, vocabulary_size),
            Objective(ForwardKL()),
            teacher=teacher,
            denominator=7.0,
        )
        loss.backward()
    assert positions.student.weight.grad is not None
    assert set(made) - {weight} == {positions.student.weight.grad.untyped_storage().data_ptr()}
    assert not positions.student.weight.grad[vocabulary_size:].any()


def test_a_large_vocabulary_costs_no_precision() -> None:
    torch.manual_seed(0)
    heads = [nn.Linear(16, 131_072, bias=False) for _ in range(2)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.75)  # Logits with a standard deviation of 3.
    hidden = [torch.randn(3, 16) for _ in range(2)]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        student, teacher = (copy.deepcopy(head).to(dtype) for head in heads)
        positions = Positions(
            hidden[0].to(dtype), student, hidden[1].to(dtype), teacher, torch.zeros(3, dtype=torch.long)
        )
        ours(positions, divergence="reverse_kl")[0].backward()
        assert student.weight.grad is not None
        gradients.append(student.weight.grad.double())
    # 2e-6 is what a few roundings leave; a sum of 131,072 numbers one by one leaves 1e-5 and more.
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 5e-6
