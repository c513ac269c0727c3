"""What the student is compared with, and what takes part in the divergence beside the teacher's: the start model, outliers.

Shape letters: P positions, E events, V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks.divergence import logp, random_logits
from checks.targets import Definition, check_constant, check_target, random_logp
from reference import targets as reference
from reference.divergences import forward_kl, reverse_kl
from switchkd.distributions.divergences import ForwardKL, ReverseKL, TopForwardKL
from switchkd.errors import UserError
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher
from switchkd.loss.targets import Extrapolated, Proximal, Target, TeacherTarget
from switchkd.loss.weights import Trust
from switchkd.models.heads import Head
from switchkd.models.pair import ModelPair
from switchkd.training.start_model import StartModel
from tiny import noisy_copy, tiny_pair
from trainers import EXAMPLES, assert_same_weights, history, make_trainer, weights


@pytest.mark.parametrize(
    ("target", "definition"),
    [
        (TeacherTarget(), reference.teacher),
        (Proximal(), partial(reference.proximal, teacher_weight=0.5)),
        (Proximal(0.05), partial(reference.proximal, teacher_weight=0.05)),
        (Proximal(1.0), reference.teacher),
        (Extrapolated(), partial(reference.extrapolated, scale=1.25)),
        (Extrapolated(3.0), partial(reference.extrapolated, scale=3.0)),
        (Extrapolated(1.0), reference.teacher),
    ],
    ids=lambda part: str(part) if isinstance(part, Target) else "defined",
)
def test_each_target_is_that_of_its_definition(target: Target, definition: Definition) -> None:
    check_target(target, definition)


@pytest.mark.parametrize("target", [TeacherTarget(), Proximal(1.0), Extrapolated(1.0)], ids=str)
def test_what_is_the_teacher_is_it_to_the_last_bit(target: Target) -> None:
    for dtype in (torch.float32, torch.float64):
        teacher, student, start = (each.to(dtype) for each in random_logp(5))
        assert torch.equal(target(teacher, student, start), teacher)
    assert TeacherTarget()(teacher, student, None) is teacher


@pytest.mark.parametrize("target", [Proximal(0.2), Extrapolated(1.5)], ids=str)
def test_a_target_is_normalized_in_float32(target: Target) -> None:
    found = target(*(each.float() for each in random_logp(6, positions=40, events=300)))
    # A float32 sum of 300 probabilities.
    torch.testing.assert_close(found.logsumexp(dim=-1), torch.zeros(40), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        (Proximal, 0.0, "target.teacher_weight is 0.0; it has to be above 0 and at most 1"),
        (Proximal, 1.1, "target.teacher_weight is 1.1"),
        (Extrapolated, 0.9, r"target.scale is 0.9; it has to be 1 \(the teacher\) or more"),
        (Extrapolated, math.inf, "target.scale is inf"),
        (Extrapolated, math.nan, "target.scale is nan"),
    ],
)
def test_settings_out_of_range_are_refused(target: Any, value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        target(value)


# ------------------------------------------------------------------------------------------------------ in the objective


def identity_head(vocabulary: int) -> Head:
    """Logits are the hidden states themselves."""
    projection = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(vocabulary))
    return Head(projection.requires_grad_(False), vocabulary, lambda logits: logits)


def our_losses(
    objective: Objective,
    student_NV: Tensor,
    teacher_NV: Tensor,
    start_NV: Tensor | None = None,
    share_N: Tensor | None = None,
) -> Tensor:
    """The sum of the objective at all positions, from logits."""
    head, temperature = identity_head(student_NV.shape[-1]), objective.loss_temperature
    start = None if start_NV is None else DenseTeacher(start_NV, head, temperature)
    tokens = torch.zeros(len(student_NV), dtype=torch.long)
    loss, _ = distillation_loss(
        Counted(student_NV, tokens, other_share_N=share_N, start=start),
        head,
        objective,
        teacher=DenseTeacher(teacher_NV, head, temperature),
        denominator=1.0,
        chunk_positions=3,
    )
    return loss


def some_logits(seed: int = 0, count: int = 8, vocabulary: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, start = (
        torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return student.requires_grad_(), teacher, start


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_no_gradient_passes_through_a_target(weight: float) -> None:
    def constant(student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
        with torch.no_grad():
            target = (weight * logp(teacher_PV) + (1 - weight) * logp(student_PV)).log_softmax(dim=-1)
        return (target.exp() * (target - logp(student_PV))).sum(dim=-1)

    objective = Objective(ForwardKL(), target=Proximal(weight))
    check_constant(lambda student, teacher: our_losses(objective, student, teacher.detach()), constant)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_extrapolated_target_is_made_at_the_loss_temperature(temperature: float) -> None:
    student, teacher, start = some_logits()
    objective = Objective(ReverseKL(), loss_temperature=temperature, target=Extrapolated(1.5))
    assert objective.needs_start
    rows = [(each.detach() / temperature).softmax(dim=-1).tolist() for each in (student, teacher, start)]
    expected = sum(reverse_kl(s, reference.extrapolated(t, s, o, scale=1.5)) for s, t, o in zip(*rows, strict=True))
    # float64: roundings of 48 terms.
    assert our_losses(objective, student, teacher, start).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()], ids=str)
def test_the_divergence_to_the_start_model_is_added(divergence: Any, temperature: float) -> None:
    student, teacher, start = some_logits(1)
    objective = Objective(
        ForwardKL(), loss_temperature=temperature, start_weight=0.7, start_divergence=divergence, target=Proximal()
    )
    loss = our_losses(objective, student, teacher, start)
    # Written out with plain autograd.
    p, t, o = (logp(each / temperature) for each in (student, teacher, start))
    target = ((t + p.detach()) / 2).log_softmax(dim=-1)
    first, second = (p, o) if divergence == ReverseKL() else (o, p)
    expected = (target.exp() * (target - p)).sum() + 0.7 * (first.exp() * (first - second)).sum()
    # float64: roundings of 48 terms.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(each, student)[0] for each in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


def test_a_missing_start_model_is_refused() -> None:
    student, teacher, _ = some_logits()
    for objective in (Objective(ForwardKL(), target=Extrapolated()), Objective(ForwardKL(), start_weight=0.1)):
        with pytest.raises(ValueError, match="compares with the start model, so it needs that model's signal"):
            our_losses(objective, student, teacher)


# ------------------------------------------------------------------------------------------- a share of the divergence


def test_a_share_of_each_positions_divergence_goes_to_the_other_one() -> None:
    student, teacher, _ = some_logits(2)
    shares = torch.tensor([0.0, 1.0, 0.25, 0.9, 0.5, 0.0, 1.0, 1e-3], dtype=torch.float64)
    rows = [logp(each.detach()).exp().tolist() for each in (student, teacher)]
    for objective, other in (
        (Objective(ReverseKL(), teacher_text_divergence=ForwardKL()), forward_kl),
        (Objective(ReverseKL(), weights=(Trust(top_k=2),)), partial(reference.top_forward_kl, top_k=2)),
    ):
        found = objective.divergence_shared(logp(student), logp(teacher), shares)
        expected = [
            (1 - share) * reverse_kl(s, t) + share * other(s, t)
            for share, s, t in zip(shares.tolist(), *rows, strict=True)
        ]
        # float64: roundings of sums of 6.
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)
        # As float32, in which a batch's shares arrive.
        assert our_losses(objective, student, teacher, share_N=shares.float()).item() == pytest.approx(
            sum(expected), rel=1e-6
        )
        without = objective.divergence_shared(logp(student), logp(teacher), None)
        assert without.tolist() == pytest.approx([reverse_kl(s, t) for s, t in zip(*rows, strict=True)], rel=1e-12)


def test_an_infinite_divergence_without_a_share_stays_out() -> None:
    student_PV, teacher_PV = random_logits((4, 5))
    excluded = torch.zeros(4, 5, dtype=torch.bool)
    # The student excludes what the teacher does not (forward KL infinite), then the teacher (reverse KL infinite).
    student = student_PV.masked_fill(
        excluded.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(True)), -math.inf
    )
    teacher = teacher_PV.detach().masked_fill(
        excluded.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(True)), -math.inf
    )
    objective = Objective(ReverseKL(), teacher_text_divergence=ForwardKL())
    assert ForwardKL()(logp(student), logp(teacher))[0] == ReverseKL()(logp(student), logp(teacher))[1] == math.inf
    found = objective.divergence_shared(logp(student), logp(teacher), torch.tensor([0.0, 1.0, 0.5, 0.25]))
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.sum(), student_PV)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(dim=-1) > 0).all()


# -------------------------------------------------------------------------------------------------------- top forward KL


@pytest.mark.parametrize("top_k", [1, 3, 17, 64])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_the_top_forward_kl_is_that_of_its_definition(top_k: int, shape: tuple[int, ...]) -> None:
    # float64: roundings of 17 terms. float32: log-probabilities of 30 nats have an error of 30 * 2^-24 = 2e-6.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = (logp(each).detach() for each in random_logits((*shape, 17), dtype=dtype))
        found = TopForwardKL(top_k)(student, teacher)
        assert found.dtype == dtype
        rows = zip(*(each.double().exp().reshape(-1, 17).tolist() for each in (student, teacher)), strict=True)
        expected = torch.tensor([reference.top_forward_kl(s, t, top_k=top_k) for s, t in rows], dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected.reshape(shape), rtol=tolerance, atol=tolerance)


def test_the_gradient_of_the_top_forward_kl() -> None:
    student, teacher = random_logits((3, 6))
    assert torch.autograd.gradcheck(lambda s: TopForwardKL(2)(logp(s), logp(teacher.detach())), (student,))


def test_all_ids_tied_at_the_edge_count() -> None:
    teacher = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    student = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        found = [float(TopForwardKL(k)(student[order].log(), teacher[order].log())) for k in (1, 2, 4, 9)]
        of_first, of_all = 0.4 * math.log(4), forward_kl(student.tolist(), teacher.tolist())
        # float64: four roundings.
        assert found == pytest.approx([of_first, of_all, of_all, of_all], rel=1e-14)


def test_excluded_ids_in_the_top_forward_kl() -> None:
    """What both exclude adds nothing, though it is among the top; what the student alone excludes makes it infinite."""
    student_PV, teacher = (each[:2] for each in random_logits((2, 5)))
    both = torch.tensor([False, True, False, True, True])
    student, teacher = (logp(each.masked_fill(both, -math.inf)) for each in (student_PV, teacher.detach()))
    value = TopForwardKL(4)(student, teacher)
    # float64: two terms.
    torch.testing.assert_close(value, ForwardKL()(student, teacher), rtol=1e-13, atol=1e-13)
    (gradient,) = torch.autograd.grad(value.sum(), student_PV)
    assert gradient.isfinite().all()
    alone = torch.tensor([-math.inf, 0.0]), torch.tensor([0.5, 0.5]).log()
    assert TopForwardKL(1)(*alone) == math.inf


# -------------------------------------------------------------------------------------------------- in a whole training


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_student_that_does_not_move_is_0_from_its_start(tmp_path: Path) -> None:
    pair, found = tiny_pair("llama", layers=1, dtype=torch.float64), []
    for start_weight in (0.0, 50.0):
        options: dict[str, Any] = {"method": "kd", "learning_rate": 0.0, "max_steps": 2, "start_weight": start_weight}
        trainer = make_trainer(tmp_path, pair, **options)
        trainer.train()
        found.append(losses(trainer))
    # A reverse KL to equal distributions is exactly 0.
    assert found[0] == found[1]
    assert min(found[0]) > 0.01


def test_a_student_that_moves_is_held_back(tmp_path: Path) -> None:
    """The second step's loss has the divergence to the first student, written out; the start model itself stays."""
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    options: dict[str, Any] = {"method": "kd", "start_weight": 3.0, "learning_rate": 1e-2}
    options |= {"lr_scheduler_type": "constant"}
    one_step, trainer = (make_trainer(tmp_path, pair, EXAMPLES[:4], **options, max_steps=steps) for steps in (1, 2))
    start = trainer._loss.start
    assert start is not None
    before = copy.deepcopy(start.model.state_dict())
    trainer.train()
    one_step.train()
    assert_same_weights(start.model.state_dict(), before)
    assert_same_weights(before, pair.student.state_dict())
    assert not any(each.requires_grad for each in start.model.parameters())
    total, tokens = 0.0, 0
    for example in EXAMPLES[:4]:
        ids = torch.tensor([[*example.prompt.token_ids, *example.response_ids]])
        models: list[Any] = [one_step.pair.student, pair.teacher, pair.student]
        with torch.no_grad():
            rows = [
                model(ids).logits[0, len(example.prompt.token_ids) - 1 : -1].softmax(-1).tolist() for model in models
            ]
        total += sum(forward_kl(s, t) + 3 * reverse_kl(s, o) for s, t, o in zip(*rows, strict=True))
        tokens += len(example.response_ids)
    # transformers adds the losses of a step up in float32.
    assert losses(trainer)[1] == pytest.approx(total / tokens, rel=1e-6)


def test_the_start_of_an_adapter_is_the_student_without_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pair = tiny_pair("llama", layers=1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options: dict[str, Any] = {"method": "kd", "max_steps": 2, "start_weight": 0.5, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, pair, peft_config=config, **options)
    start = trainer._loss.start
    assert start is not None
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = pair.student.get_decoder()(ids).last_hidden_state
        moved = trainer.pair.student.get_decoder()(ids).last_hidden_state
    trainer.train()
    # The same weights in the same order of operations.
    torch.testing.assert_close(start.hidden(ids, torch.ones_like(ids)), expected, rtol=0, atol=0)
    assert (moved - expected).abs().max() > 0.01
    # It shares the student's weights: no copy.
    assert list(start.model.parameters()) == []


def test_a_start_model_is_a_copy_that_training_does_not_reach() -> None:
    pair = tiny_pair("gpt2", layers=1)
    student = copy.deepcopy(pair.student).train()
    start = StartModel(ModelPair(student, pair.teacher))
    ids = torch.tensor([[5, 6, 7, 8]])
    before = start.hidden(ids, torch.ones_like(ids))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(start.hidden(ids, torch.ones_like(ids)), before)
    assert not before.requires_grad
    assert not start.model.training
    assert student.training


@pytest.mark.parametrize("setting", [{"start_weight": 0.5}, {"target": Extrapolated(1.5)}], ids=["start", "target"])
def test_resumed_equals_uninterrupted_with_a_start_model(setting: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "gkd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **setting}
    pair = tiny_pair("llama", layers=1)
    whole = make_trainer(tmp_path, pair, **options)
    whole.train()
    resumed = make_trainer(tmp_path, pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(whole), weights(resumed))
    assert history(whole)[:-1] == history(resumed)[:-1]
    # Another start model is another run, so that the one above has taken part.
    other = make_trainer(tmp_path, ModelPair(noisy_copy(pair.student, 0.3, seed=9), pair.teacher), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(other)[-1] != losses(resumed)[-1]
