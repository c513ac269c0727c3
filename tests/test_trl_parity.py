"""Where TRL has the method, its value and gradient are ours; run with trl installed (the `bench` extra)."""

from __future__ import annotations

import pytest
import torch

from switchkd.distributions.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL

gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")


# TRL's beta is the teacher's weight in the mixture; its ends are the one-sided divergences.
@pytest.mark.parametrize(
    ("beta", "ours"),
    [(0.0, ForwardKL()), (1.0, ReverseKL()), *((weight, JensenShannon(weight)) for weight in (0.1, 0.5, 0.9))],
)
def test_gkd_loss_and_gradient(beta: float, ours: Divergence) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 7, 31, generator=generator) for _ in range(2))
    labels = torch.ones(2, 7, dtype=torch.long)
    labels[1, 4:] = -100
    losses, gradients = [], []
    for which in ("trl", "ours"):
        logits = student.clone().requires_grad_()
        if which == "trl":
            loss = gkd.GKDTrainer.generalized_jsd_loss(logits, teacher, labels=labels, beta=beta)
        else:
            kept = labels != -100
            loss = ours(logits.log_softmax(-1)[kept], teacher.log_softmax(-1)[kept]).sum() / kept.sum()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, logits)[0])
    # Float32 sums over 31 ids in two orders.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
