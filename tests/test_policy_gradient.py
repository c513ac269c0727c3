"""MiniLLM's loss: over all texts, its gradient is that of the divergence of whole sequences."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from switchkd.distributions.divergences import ReverseKL
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.policy_gradient import importance_and_returns
from switchkd.loss.signals import DenseTeacher
from switchkd.models.heads import Head
from switchkd.records import Batch
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Positions

V = 4
# A state for the first token, and one for each first token that may stand before the second.
STATES = torch.eye(1 + V, dtype=torch.float64)
TEXTS = list(itertools.product(range(V), repeat=2))


def logits(seed: int) -> Tensor:
    return torch.randn(V, 1 + V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logp_of(weight: Tensor, text: tuple[int, int]) -> Tensor:
    """The log-probabilities of the two tokens, each given what is before it."""
    logp = weight.log_softmax(dim=0)
    return torch.stack([logp[text[0], 0], logp[text[1], 1 + text[0]]])


def loss_of(text: tuple[int, int], student: Tensor, teacher: Tensor, law: Tensor) -> Tensor:
    """The objective's sum over the text's two tokens, as the trainer puts it together."""
    row = {name: torch.zeros(1, 3, dtype=torch.float64) for name in ("student", "teacher", "law")}
    for name, weight in (("student", student), ("teacher", teacher), ("law", law)):
        row[name][0, 1:] = logp_of(weight.detach(), text)
    response = torch.tensor([[False, True, True]])
    ids = torch.tensor([[0, *text]])
    batch = Batch(
        ids,
        torch.ones_like(ids),
        response,
        response,
        torch.zeros_like(response),
        student_logp_BT=row["student"],
        teacher_logp_BT=row["teacher"],
        law_logp_BT=row["law"],
    )
    importance_BT, return_BT = importance_and_returns(batch)
    states = STATES[[0, 1 + text[0]]]
    loss, _ = distillation_loss(
        Counted(states, torch.tensor(text), weight_N=importance_BT[response], return_N=return_BT[response]),
        head_of(student),
        Objective(ReverseKL(), long_term_weight=1.0),
        teacher=DenseTeacher(states, head_of(teacher)),
        denominator=1.0,
    )
    return loss


def head_of(weight: Tensor) -> Head:
    """A head whose weight is this tensor, not a copy in a module, so that gradients reach it."""
    return Head(cast(nn.Linear, SimpleNamespace(weight=weight, bias=None)), V, lambda projected: projected)


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, weight)
    return found


def expected_gradient(student: Tensor, teacher: Tensor, law: Tensor) -> Tensor:
    """The estimator's mean over all texts, each as likely as the law (a weight of head shape in log space) has it."""
    total = torch.zeros_like(student)
    for text in TEXTS:
        probability = logp_of(law, text).sum().exp()
        total += probability * gradient(loss_of(text, student, teacher, law), student)
    return total


def law_of(policy: Policy, student: Tensor, teacher: Tensor) -> Tensor:
    """The logarithms (V, states) of the laws that the policy decides on, one column for each state."""
    student_logp, teacher_logp = (weight.detach().log_softmax(dim=0).T for weight in (student, teacher))
    nothing = torch.zeros(1 + V, dtype=torch.float64)
    decision = policy.decide(Positions(nothing.long(), nothing, student_logp, teacher_logp, nothing, max_new_tokens=2))
    assert decision.blend is not None
    return decision.blend.logp.T


def test_on_the_students_text_it_is_the_gradient_of_the_sequences_divergence() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    exact = sum((q := logp_of(student, text).sum()).exp() * (q - logp_of(teacher, text).sum()) for text in TEXTS)
    assert isinstance(exact, Tensor)
    # With two tokens, one is left after the first, so the normalization by length divides by 1.
    found = expected_gradient(student, teacher, student.detach())
    torch.testing.assert_close(found, gradient(exact, student), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "policy", [Mix(0.2), Mix(0.7), Interleave(2), TrustRegionBlend(0.1), TrustRegionBlend(0.5)], ids=str
)
def test_on_the_text_of_any_law_it_is_equation_8(policy: Policy) -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    q, p = student.detach().softmax(dim=0), teacher.softmax(dim=0)
    law_logp = law_of(policy, student, teacher)
    written = law_logp.exp()
    # Else the next lines show nothing: the law is neither model's.
    assert min(float((written - each).abs().max()) for each in (q, p)) > 0.02
    # Equation 8 token by token: for each prefix, the weights turn the mean over the law into one over the student.
    logp = student.log_softmax(dim=0)
    single = (logp.exp() * (logp - p.log())).sum(dim=0)
    surrogate = single[0]
    for first in range(V):
        surrogate = surrogate + written[first, 0] * single[1 + first]
        reward = (written[:, 1 + first] * (p[:, 1 + first].log() - q[:, 1 + first].log())).sum()
        surrogate = surrogate - q[first, 0] * reward * logp[first, 0]
    found = expected_gradient(student, teacher, law_logp)
    torch.testing.assert_close(found, gradient(surrogate, student), rtol=0, atol=1e-12)  # float64 over 16 texts
