"""The mathematics on fake tensors of another device: an operation that mixes in one of the host raises, as on a GPU.

Fake tensors have shapes, types and devices, but no numbers. They are labeled "meta": under the label "cuda" a build without CUDA
cannot index them, nor go backward. Whole models cannot be moved to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from switchkd.distributions.divergences import DIVERGENCES, ForwardKL, JensenShannon
from switchkd.distributions.draw import Draft, student_proposal, written_tokens
from switchkd.distributions.noise import Address, Stream, gumbel, row_keys, uniform
from switchkd.distributions.shaping import ban_repeated_ngrams, entropy, log_probabilities, shaped_logp
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher, TopKTeacher
from switchkd.loss.targets import Proximal
from switchkd.models.heads import Head
from switchkd.records import Prompt, Sampling
from switchkd.rollout.block import Verdict, read_back
from switchkd.rollout.law import Policy, Positions
from switchkd.rollout.log import Compared
from switchkd.rollout.policies import POLICIES
from switchkd.rollout.write import write

B, T, V, H, N = 3, 4, 11, 6, 9
DEVICE = torch.device("meta")


class _Answers(TorchDispatchMode):
    """Answers a question for one number with 1: a fake tensor has none, and which branch is taken is not what is tested."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    # The number of elements that a mask selects is a symbol.
    with (
        config.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True),
        _Answers(),
    ):
        yield


def logp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.log_softmax(torch.randn(*shape, V, device=DEVICE, dtype=dtype), dim=-1)


def address(*shape: int) -> Address:
    key = row_keys(0, [Prompt((1,), row) for row in range(B)], DEVICE)
    assert key.device == DEVICE
    position = (
        torch.arange(B, device=DEVICE) if len(shape) == 1 else torch.zeros(shape, dtype=torch.long, device=DEVICE)
    )
    return Address(key if len(shape) == 1 else key[:, None].expand(shape), position)


def head() -> Head:
    return Head(nn.Linear(H, V + 2, device=DEVICE), V, lambda logits: logits * 2)


@pytest.mark.parametrize("shape", [(B,), (B, T)])
def test_noise(shape: tuple[int, ...]) -> None:
    assert uniform(address(*shape), Stream.KEEP).device == gumbel(address(*shape), Stream.PROPOSAL, V).device == DEVICE


@pytest.mark.parametrize(
    "sampling", [Sampling(4), Sampling(4, temperature=0), Sampling(4, temperature=0.7, top_p=0.9, top_k=5)]
)
def test_shaping(sampling: Sampling) -> None:
    logits = torch.randn(B, V, device=DEVICE, dtype=torch.bfloat16)
    logits = ban_repeated_ngrams(logits, [[1, 2, 1], [3, 3], [4]], 2)
    assert shaped_logp(logits, sampling).device == DEVICE
    assert entropy(log_probabilities(logits, 0.5)).device == DEVICE


# Fake tensors of torch 2.9 and 2.10 cannot be written to where a mask chooses how many rows there are, as a draw does.
SAMPLED = pytest.param(
    False, marks=pytest.mark.skipif(torch.__version__ < (2, 13), reason="needs fake tensors of torch 2.13")
)


@pytest.mark.parametrize("greedy", [SAMPLED, True])
def test_draws(greedy: bool) -> None:
    draft = drafted(B, T, greedy=greedy)
    elsewhere = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    token, replaced = written_tokens(draft, logp(B, T), elsewhere, greedy=greedy)
    assert token.device == replaced.device == DEVICE


def drafted(*shape: int, greedy: bool) -> Draft:
    at, student = address(*shape), logp(*shape)
    return Draft(student_proposal(student, at, greedy=greedy), student, at)


def positions(*shape: int, greedy: bool = False) -> Positions:
    past = torch.zeros(B, 2, dtype=torch.float64)
    return Positions(
        position=torch.zeros(shape, dtype=torch.long, device=DEVICE),
        divergence=torch.rand(shape, device=DEVICE),
        student_logp=logp(*shape),
        teacher_logp=logp(*shape),
        coin=torch.rand(shape, device=DEVICE),
        max_new_tokens=8,
        greedy=greedy,
        past_divergence=past,
        past_by_teacher=past > 0,
    )


@pytest.mark.parametrize("greedy", [SAMPLED, True])
@pytest.mark.parametrize("shape", [(B,), (B, T)])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_policies_and_what_they_write(policy: type[Policy], shape: tuple[int, ...], greedy: bool) -> None:
    seen = positions(*shape, greedy=greedy)
    decision = policy().decide(seen)
    # The threshold goes into the record, which is the host's: it may be there already.
    assert decision.by_teacher.device == DEVICE
    if decision.blend is not None:
        assert decision.blend.logp.device == DEVICE
        assert decision.blend.teacher_mass is None or decision.blend.teacher_mass.device == DEVICE
    compared = Compared(seen.teacher_logp, seen.divergence, seen.coin, torch.rand(shape, device=DEVICE))
    written = write(decision, drafted(*shape, greedy=greedy), compared, greedy=greedy)
    assert {(each.device, each.shape) for each in written} == {(DEVICE, torch.Size(shape))}


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
def test_divergences(divergence: Any) -> None:
    student = logp(N).requires_grad_()
    value = divergence()(student, logp(N))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.device == gradient.device == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signal", ["dense", "top k", "none"])
def test_objective(signal: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(N, H, device=DEVICE, requires_grad=True)
    ids = torch.zeros(N, dtype=torch.long, device=DEVICE)
    objective = Objective(None, 1.0) if signal == "none" else Objective(JensenShannon(), 0.5, long_term_weight=1.0)
    if signal == "dense":
        objective = Objective(
            JensenShannon(), 0.5, target=Proximal(), teacher_text_divergence=ForwardKL(), long_term_weight=1.0
        )
    weight, share, returns = (torch.rand(N, device=DEVICE) for _ in range(3))
    counted = Counted(hidden, ids, weight, share, returns)
    of_teacher = Head(nn.Linear(H, V, device=DEVICE, dtype=dtype), V, lambda logits: logits)
    # The teacher's states may come from the host: they are moved chunk by chunk.
    teachers = {
        "dense": DenseTeacher(torch.randn(N, H, dtype=dtype), of_teacher),
        "top k": TopKTeacher(torch.zeros(N, 3, dtype=torch.long), logp(N)[:, :3].cpu()),
        "none": None,
    }
    student = head()
    denominator = torch.ones((), device=DEVICE)
    loss, report = distillation_loss(
        counted, student, objective, teacher=teachers[signal], denominator=denominator, measure=True, chunk_positions=4
    )
    gradients = torch.autograd.grad(loss, [hidden, student.projection.weight])
    assert {tensor.device for tensor in (loss, *gradients, report.cross_entropy_N)} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_block_is_read_back(policy: type[Policy], dtype: torch.dtype) -> None:
    """AdaSwitch's threshold is in float64 on the host, whatever type the models compute in."""
    seen = positions(B, T, greedy=True)
    seen = replace(
        seen, **{name: getattr(seen, name).to(dtype) for name in ("divergence", "student_logp", "teacher_logp")}
    )
    draft, decision = drafted(B, T, greedy=True), policy().decide(seen)
    compared = Compared(seen.teacher_logp, seen.divergence, seen.coin, torch.rand(B, T, device=DEVICE))
    verdict = Verdict(write(decision, draft, compared, greedy=True), seen.divergence, decision.threshold)
    recorded = read_back(verdict, torch.tensor([1], device="cpu"))
    assert {each.device.type for each in (recorded.ends, *recorded.columns)} == {"cpu"}


class _OnTheHost(Policy):
    def decide(self, positions: Positions) -> Any:
        return positions.divergence > torch.linspace(0, 1, T)


def test_a_tensor_of_the_host_is_found() -> None:
    with pytest.raises(RuntimeError, match="device"):
        _OnTheHost().decide(positions(B, T))
