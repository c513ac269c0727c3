"""The chunked loss on whole models: every parameter's gradient is that of the model's own logits under plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks.divergence import divergence_named
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher
from switchkd.models.heads import Head, last_hidden
from tiny import VOCABULARY, tiny_model

OBJECTIVE = Objective(divergence_named("jensen_shannon"), cross_entropy_weight=0.3, loss_temperature=1.5)
IDS_BT = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
COUNTED_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]).bool()
MASK_BT = torch.ones_like(IDS_BT)


def frozen_head(model: nn.Module) -> nn.Module:
    model.get_output_embeddings().requires_grad_(False)
    return model


def frozen_backbone(model: nn.Module) -> nn.Module:
    model.get_decoder().requires_grad_(False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    # The older of the two names, in older releases of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    return model.train()


def adapter(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
        # As initialized, an adapter adds nothing, and half of its matrices get no gradient.
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return wrapped

    return wrap


def unchanged(model: nn.Module) -> nn.Module:
    return model


STUDENTS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "trained head": ("llama", unchanged),
    "frozen head": ("llama", frozen_head),
    "frozen backbone": ("llama", frozen_backbone),
    "tied head": ("qwen2", unchanged),
    "learned positions": ("gpt2", unchanged),
    "projected embeddings": ("opt", unchanged),
    "capped logits": ("gemma2", unchanged),
    "adapter": ("llama", adapter()),
    "adapter and a copy of the head": ("llama", adapter(modules_to_save=["lm_head"])),
    "adapter on a tied head": ("qwen2", adapter()),
    "checkpointed": ("llama", checkpointed),
    "checkpointed adapter": ("llama", lambda model: checkpointed(adapter()(model))),
}


def gradients(student: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    wanted = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def ours(student: nn.Module, teacher: nn.Module, counted_BT: Tensor = COUNTED_BT, chunk: int | None = 4) -> Tensor:
    with torch.no_grad():
        teacher_hidden_NH = last_hidden(teacher, teacher, IDS_BT, MASK_BT)[:, :-1][counted_BT]
    student_hidden_NH = last_hidden(student, student, IDS_BT, MASK_BT)[:, :-1][counted_BT]
    return distillation_loss(
        Counted(student_hidden_NH, IDS_BT[:, 1:][counted_BT]),
        Head.of(student),
        OBJECTIVE,
        teacher=DenseTeacher(teacher_hidden_NH, Head.of(teacher), OBJECTIVE.loss_temperature),
        denominator=14,
        chunk_positions=chunk,
    )[0]


def plain(student: nn.Module, teacher: nn.Module) -> Tensor:
    """From the models' own logits, all at once."""
    student_logits, teacher_logits = (
        model(input_ids=IDS_BT, attention_mask=MASK_BT).logits[:, :-1][COUNTED_BT] for model in (student, teacher)
    )
    student_logits = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    pair = ((each.to(student_logits) / 1.5).log_softmax(-1) for each in (student_logits, teacher_logits.detach()))
    cross_entropy = nn.functional.cross_entropy(student_logits, IDS_BT[:, 1:][COUNTED_BT], reduction="sum")
    return (divergence_named("jensen_shannon")(*pair).sum() + 0.3 * cross_entropy) / 14


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_gradient_is_that_of_the_models_own_logits(kind: str) -> None:
    family, prepare = STUDENTS[kind]
    teacher = tiny_model(family, dtype=torch.float64, seed=1).requires_grad_(False)
    student = prepare(tiny_model(family, dtype=torch.float64))
    expected = plain(student, teacher)
    expected_gradients = gradients(student, expected)
    assert sum(gradient.abs().sum() for gradient in expected_gradients.values()) > 0.1
    for chunk in (1, 4, 14, None):
        value = ours(student, teacher, chunk=chunk)
        # Float64 sums in another order, on gradients of up to 10.
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        found = gradients(student, value)
        assert found.keys() == expected_gradients.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", STUDENTS)
def test_no_counted_position_is_a_loss_of_0_with_gradients_of_0(kind: str) -> None:
    """Whatever trains, and under autocast too: a micro-batch without responses must not leave a parameter waiting."""
    family, prepare = STUDENTS[kind]
    teacher = tiny_model(family).requires_grad_(False)
    student = prepare(tiny_model(family))
    expected = gradients(student, ours(student, teacher))
    for autocast in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with autocast:
            value = ours(student, teacher, torch.zeros_like(COUNTED_BT))
        assert value == 0
        found = gradients(student, value)
        assert found.keys() == expected.keys()
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("kind", ["trained head", "frozen head", "tied head", "adapter", "checkpointed"])
def test_under_autocast_value_and_gradients_are_near_the_float32_ones(kind: str) -> None:
    """`bf16=True` of transformers. At a scale of 5 the models are not so steep that 8 bits lose the direction."""
    family, prepare = STUDENTS[kind]
    teacher = tiny_model(family, seed=1, scale=5.0).requires_grad_(False)
    student = prepare(tiny_model(family, scale=5.0))
    exact = ours(student, teacher)
    exact_gradients = gradients(student, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(student, teacher)
    assert value.dtype == torch.float32
    # 8 bits: each number is off by up to 0.4 %, and a model of two layers adds a dozen of them up.
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)
    together, exactly = (
        torch.cat([each[name].flatten() for name in exact_gradients])
        for each in (gradients(student, value), exact_gradients)
    )
    assert together.dtype == torch.float32
    assert (together - exactly).norm() / exactly.norm() < 5e-2
