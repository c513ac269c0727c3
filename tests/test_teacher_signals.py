"""What a teacher can say (hidden states, log-probabilities, the likeliest ids) and what is measured along the way.

Shape letters: V vocabulary, K ids kept, N counted positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from checks.divergence import Reference, divergence_named, logp, random_logits
from checks.objective import assert_equal
from switchkd.distributions.divergences import DIVERGENCES, ForwardKL
from switchkd.errors import UserError
from switchkd.loss.objective import Counted, Objective, Report, distillation_loss
from switchkd.loss.signals import DenseTeacher, TeacherSignal, TopKTeacher
from switchkd.loss.weights import Trust
from switchkd.models.heads import Head

# A function of the ratio of the two probabilities, averaged: what merging events cannot raise.
F_DIVERGENCES = [name for name in DIVERGENCES if name not in ("adaptive_kl", "alpha_beta")]


@dataclass(frozen=True)
class LogpTeacher:
    """The whole distributions kept as log-probabilities (N, V) at temperature 1, without heads or chunks: an oracle."""

    logp_NV: Tensor
    loss_temperature: float = 1.0

    def compare(self, student_logp_PV: Tensor, at: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        return student_logp_PV, logp(self.logp_NV[at] / self.loss_temperature)


def identity_head(vocabulary: int) -> Head:
    """Hidden states that are the logits."""
    projection = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(vocabulary))
    return Head(projection, vocabulary, lambda logits: logits)


def run(
    student_logits_NV: Tensor,
    teacher: TeacherSignal | None,
    *,
    divergence: str | None = "forward_kl",
    loss_temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Report]:
    """The sum over positions, and its report."""
    function = None if divergence is None else divergence_named(divergence)
    return distillation_loss(
        Counted(student_logits_NV, torch.zeros(len(student_logits_NV), dtype=torch.long)),
        identity_head(student_logits_NV.shape[-1]),
        Objective(function, cross_entropy_weight, loss_temperature),
        teacher=teacher,
        denominator=1.0,
        **options,
    )


def value_and_gradient(student_logits_NV: Tensor, teacher: TeacherSignal, **options: Any) -> list[Tensor]:
    value, _ = run(student_logits_NV, teacher, **options)
    return [value, *torch.autograd.grad(value, student_logits_NV)]


def top_k(teacher_logp_NV: Tensor, k: int, *, with_rest: bool = False) -> TeacherSignal:
    kept = teacher_logp_NV.topk(k, dim=-1)
    rest_logp_N = teacher_logp_NV.scatter(-1, kept.indices, -torch.inf).logsumexp(dim=-1) if with_rest else None
    return TopKTeacher(kept.indices, kept.values, rest_logp_N=rest_logp_N)


def compared(signal: TeacherSignal, student_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher over the same events, at all positions."""
    whole = slice(0, len(student_logp_NV))
    return signal.compare(student_logp_NV, whole, whole)


def logits_of_both(count: int = 20, vocabulary: int = 11, **options: Any) -> tuple[Tensor, Tensor]:
    student, teacher = random_logits((count, vocabulary), **options)
    return student, teacher.detach()


# ----------------------------------------------------------------------------------------------------- whole distributions


@pytest.mark.parametrize("loss_temperature", [0.4, 1.0, 2.5])
def test_hidden_states_say_the_same_as_log_probabilities(loss_temperature: float) -> None:
    student, teacher = logits_of_both()
    options = {"divergence": "reverse_kl", "loss_temperature": loss_temperature, "chunk_positions": 7}
    expected = value_and_gradient(student, DenseTeacher(teacher, identity_head(11), loss_temperature), **options)
    assert_equal(value_and_gradient(student, LogpTeacher(logp(teacher), loss_temperature), **options), expected)


def test_what_a_teacher_says_gets_no_gradient() -> None:
    student, teacher = random_logits((6, 11))
    for signal in (DenseTeacher(teacher, identity_head(11)), top_k(logp(teacher), 4)):
        assert not compared(signal, logp(student))[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_answers_in_the_student_s_type(dtype: torch.dtype) -> None:
    student, teacher = logits_of_both()
    for signal in (top_k(logp(teacher.half()), 4), top_k(logp(teacher), 4), DenseTeacher(teacher, identity_head(11))):
        ours, theirs = signal.compare(logp(student.to(dtype))[3:8], slice(3, 8), slice(2, 9))
        assert ours.dtype == theirs.dtype == dtype
        assert ours.shape == theirs.shape
        assert len(ours) == 5


# ---------------------------------------------------------------------------------------------------- the likeliest ids


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_ids_kept_is_the_dense_teacher(divergence: str) -> None:
    student, teacher = logits_of_both()
    expected = value_and_gradient(student, LogpTeacher(logp(teacher)), divergence=divergence)
    assert_equal(value_and_gradient(student, top_k(logp(teacher), 11), divergence=divergence), expected)
    assert compared(top_k(logp(teacher), 11), logp(student))[1].shape == (20, 11)
    single = [each.float() for each in (student.detach(), teacher)]
    value = divergence_named(divergence)(*compared(top_k(logp(single[1]), 11), logp(single[0]))).sum()
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)  # a few float32 roundings of 6e-8


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_value_and_gradient_are_the_definition_s_over_k_ids_and_the_rest(divergence: str, k: int) -> None:
    student, teacher = logits_of_both()
    kept = logp(teacher).topk(k, dim=-1)
    is_kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, kept.indices, True)

    def events(logits: Tensor) -> Tensor:
        p = logits.detach().softmax(dim=-1)
        return torch.cat([p.gather(-1, kept.indices), (p * ~is_kept).sum(dim=-1, keepdim=True)], dim=-1).log()

    reference = Reference.named(divergence)
    value, gradient = value_and_gradient(student, top_k(logp(teacher), k), divergence=divergence, chunk_positions=7)
    expected = reference.values(events(student), events(teacher)).sum()
    # Float64; the rest's mass, of 1e-3 or more, is lifted by 2e-16, and a sum of masses leaves as much of rounding.
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    of_events = reference.gradients(events(student), events(teacher))
    # The rest's logit is the log of a sum of exponentials: its gradient is shared out by probability.
    p = student.detach().softmax(dim=-1) * ~is_kept
    shared = of_events[:, -1:] * p / p.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(gradient, shared.scatter(-1, kept.indices, of_events[:, :-1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_rest", [True, False])
def test_any_chunk_size_gives_a_few_ids_one_value_and_gradient(with_rest: bool) -> None:
    student, teacher = logits_of_both()
    signal = top_k(logp(teacher), 3, with_rest=with_rest)
    expected = value_and_gradient(student, signal, chunk_positions=20)
    for chunk in (1, 7, 19, None):
        assert_equal(value_and_gradient(student, signal, chunk_positions=chunk), expected)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_merging_events_never_raises_an_f_divergence(divergence: str) -> None:
    student, teacher = logits_of_both(200, scale=3.0)
    function = divergence_named(divergence)
    values = [function(*compared(top_k(logp(teacher), k, with_rest=True), logp(student))) for k in range(1, 12)]
    torch.testing.assert_close(values[-1], function(logp(student), logp(teacher)), rtol=1e-12, atol=1e-14)
    for coarser, finer in pairwise(values):
        assert (coarser <= finer + 1e-13).all()  # float64, 11 terms, and a rest that is lifted by 2e-16
    assert (values[0] < values[-1] - 1e-3).any()


@given(k=st.integers(1, 5), scale=st.sampled_from([1.0, 30.0, 300.0]), seed=st.integers(0, 1000))
def test_a_few_ids_are_finite_whatever_the_distributions(k: int, scale: float, seed: int) -> None:
    """Peaked distributions have a rest that is 0 in float32."""
    student, teacher = random_logits((4, 6), scale=scale, seed=seed, dtype=torch.float32)
    for divergence in DIVERGENCES:
        value = divergence_named(divergence)(*compared(top_k(logp(teacher.detach()), k), logp(student)))
        # A kept id may itself be excluded, in effect, by the student: only the rest is lifted.
        assert not value.isnan().any()
        (gradient,) = torch.autograd.grad(value[value.isfinite()].sum(), student)
        assert gradient[value.isfinite()].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("empty", ["student", "teacher", "both"])
def test_an_empty_rest_is_finite_in_value_and_gradient(divergence: str, dtype: torch.dtype, empty: str) -> None:
    student, teacher = logits_of_both(dtype=dtype)
    ids_NK = torch.arange(4).expand(20, 4)
    excluded = torch.arange(11) >= 4
    student_logp = logp(student.masked_fill(excluded, -torch.inf) if empty != "teacher" else student)
    teacher_logp = logp(teacher.masked_fill(excluded, -torch.inf) if empty != "student" else teacher)
    value = divergence_named(divergence)(*compared(TopKTeacher(ids_NK, teacher_logp[:, :4]), student_logp))
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    if empty == "both":
        expected = divergence_named(divergence)(student_logp, teacher_logp)
        # The rest has a mass of a rounding, 1.2e-7 in float32, times log-ratios of a few nats; to a power of 0.9, 1e-6 / 0.14.
        assert ((value - expected).abs() < (1e-4 if dtype == torch.float32 else 1e-12)).all()


def test_a_part_over_single_ids_leaves_all_others_out() -> None:
    student, teacher = logits_of_both()
    teacher_logp, both = logp(teacher), Objective(ForwardKL(), weights=(Trust(top_k=4),))
    counted = Counted(student, torch.zeros(len(student), dtype=torch.long), other_share_N=torch.ones(len(student)))
    dense, kept, fewer = (
        distillation_loss(counted, identity_head(student.shape[-1]), both, teacher=signal, denominator=1.0)[0].detach()
        for signal in (LogpTeacher(teacher_logp), top_k(teacher_logp, 4, with_rest=True), top_k(teacher_logp, 3))
    )
    # float64, and sums of four terms.
    assert float(kept) == pytest.approx(float(dense), rel=1e-12)
    assert float(fewer) != pytest.approx(float(dense), rel=1e-3)


def test_the_rest_may_be_told_and_is_exact_then() -> None:
    """What the K leave over is known to the rounding of their sum, what is told to its own."""
    teacher_logp = torch.tensor([[0.0, -30.0, -31.0]]).log_softmax(dim=-1)
    for with_rest in (True, False):
        _, events = compared(top_k(teacher_logp, 1, with_rest=with_rest), teacher_logp)
        assert events[0, 1].item() == pytest.approx(
            math.log(torch.finfo(torch.float32).eps), abs=1e-5
        )  # the lift alone
    student, teacher = logits_of_both()
    told, worked_out = (compared(top_k(logp(teacher), 3, with_rest=given), logp(student))[1] for given in (True, False))
    torch.testing.assert_close(told, worked_out, rtol=1e-11, atol=0)  # float64: 2e-16 of a rest of 1e-3 or more
    told, worked_out = (
        compared(top_k(logp(teacher.float()), 10, with_rest=given), logp(student.float()))[1][:, -1].double()
        for given in (True, False)
    )
    exact = torch.logaddexp(logp(teacher).amin(dim=-1), torch.tensor(torch.finfo(torch.float32).eps).double().log())
    torch.testing.assert_close(told, exact, rtol=1e-6, atol=0)  # a few float32 roundings
    assert ((told - exact).abs() <= (worked_out - exact).abs()).double().mean() > 0.9


@pytest.mark.parametrize("loss_temperature", [0.5, 2.0])
def test_a_few_ids_cannot_be_brought_to_another_temperature(loss_temperature: float) -> None:
    with pytest.raises(UserError, match=rf"loss_temperature is {loss_temperature}, .* set loss_temperature to 1"):
        TopKTeacher(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), loss_temperature)


def test_ids_and_log_probabilities_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        TopKTeacher(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4))


# --------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("loss_temperature", [1.0, 2.0])
def test_entropies_and_agreement_are_those_of_the_compared_distributions(loss_temperature: float) -> None:
    student, teacher = logits_of_both(50)
    signal = DenseTeacher(teacher, identity_head(11), loss_temperature)
    _, report = run(student, signal, loss_temperature=loss_temperature, measure=True, chunk_positions=7)
    for entropy, logits in ((report.student_entropy_N, student), (report.teacher_entropy_N, teacher)):
        expected = torch.distributions.Categorical(logits=logits.detach() / loss_temperature).entropy()
        torch.testing.assert_close(entropy, expected, rtol=1e-12, atol=1e-13)  # float64, 11 terms
        assert not entropy.requires_grad
    assert report.agreement_N.tolist() == (student.argmax(dim=-1) == teacher.argmax(dim=-1)).tolist()
    assert 0 < report.agreement_N.sum() < 50


def test_measuring_is_optional_and_changes_no_loss() -> None:
    student, teacher = logits_of_both()
    plain, unmeasured = run(student, LogpTeacher(logp(teacher)))
    value, measured = run(student, LogpTeacher(logp(teacher)), measure=True)
    assert torch.equal(value, plain)
    assert torch.equal(*(torch.autograd.grad(each, student)[0] for each in (value, plain)))
    for name in ("student_entropy_N", "teacher_entropy_N", "agreement_N"):
        assert getattr(unmeasured, name).shape == (0,)
        assert getattr(measured, name).shape == (20,)
    assert torch.equal(measured.divergence_N, unmeasured.divergence_N)


def test_nothing_is_compared_without_a_divergence() -> None:
    _, report = run(logits_of_both()[0], None, divergence=None, cross_entropy_weight=1.0, measure=True)
    assert report.cross_entropy_N.shape == (20,)
    assert report.student_entropy_N.shape == report.teacher_entropy_N.shape == report.agreement_N.shape == (0,)


def test_excluded_ids_have_no_part_in_an_entropy() -> None:
    student, teacher = logits_of_both()
    kept = torch.arange(11) < 8
    full = [each.detach().masked_fill(~kept, -torch.inf) for each in (student, teacher)]

    def report(student_logits: Tensor, teacher_logits: Tensor) -> Report:
        # Through the identity head -inf would be multiplied by 0.
        head = identity_head(student_logits.shape[-1])
        masked = Head(
            head.projection,
            head.vocabulary_size,
            lambda logits: logits.masked_fill(~kept[: logits.shape[-1]], -torch.inf),
        )
        return distillation_loss(
            Counted(student_logits.nan_to_num(neginf=0.0), torch.zeros(20, dtype=torch.long)), masked,
            Objective(divergence_named("forward_kl")), teacher=LogpTeacher(logp(teacher_logits)),
            denominator=1.0, measure=True,
        )[1]  # fmt: skip

    ours, smaller = report(*full), report(student.detach()[:, :8], teacher[:, :8])
    for name in ("student_entropy_N", "teacher_entropy_N"):
        # Float64, 8 terms.
        torch.testing.assert_close(getattr(ours, name), getattr(smaller, name), rtol=1e-12, atol=1e-13)
    assert torch.equal(ours.agreement_N, smaller.agreement_N)
