"""The optimizer of the pairs' scripts takes the steps of torch.optim.Muon, in float32."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "muon.py"
# Two of a shape, one that is wide and one that is tall.
SHAPES = ((64, 64), (24, 64), (64, 64), (64, 24))


def test_its_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    muon: Any = runpy.run_path(str(SCRIPT))["Muon"]
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    ours = [torch.nn.Parameter(each.detach().clone()) for each in theirs]
    begun = [each.detach().clone() for each in theirs]
    optimizers = [torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01), muon(ours, lr=0.1, weight_decay=0.01)]
    for _ in range(3):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(begun, theirs, ours, strict=True):
        # bfloat16 has 8 bits, 0.4 % of a number; five iterations on matrices of that noise leave some of it.
        assert (one - other).norm() < 0.02 * (one - start).norm()
        # The rule stands still for no gradient, and so would a copy of it that does nothing.
        assert (one - start).norm() > 0.1
