"""Teachers with weights packed by bitsandbytes, under both engines and in a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from switchkd.errors import UserError
from switchkd.models.heads import backbone
from switchkd.models.load import load_model, load_pair
from switchkd.models.pair import ModelPair, parameter_count, rounded
from switchkd.records import Sampling
from switchkd.rollout.law import Teacher
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_pair, tiny_tokenizer
from trainers import history, make_trainer

pytest.importorskip("bitsandbytes")

PROMPTS = [[2 + (row * 7 + at) % 60 for at in range(1 + row * 5 % 13)] for row in range(12)]
BOTH = pytest.mark.parametrize("quantization", ["8bit", "4bit"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """A pair saved in two folders that its models are named after; a hidden size of 64 fills one block of 4-bit weights."""
    pair, folder = tiny_pair("llama", hidden=64, tokenizer=tiny_tokenizer()), tmp_path_factory.mktemp("models")
    for role, model in pair.models.items():
        model.name_or_path = str(folder / role)
        model.save_pretrained(folder / role)
        tiny_tokenizer().save_pretrained(folder / role)
    return pair


def packed(plain: ModelPair, quantization: str, teacher_dtype: str = "float32") -> Any:
    names = (model.name_or_path for model in plain.models.values())
    return load_pair(*names, teacher_quantization=quantization, teacher_dtype=teacher_dtype)


def final_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return states


@BOTH
@pytest.mark.parametrize("policy", [Switch(threshold=0.3, decay="constant"), Teacher()])
def test_the_engines_agree(policy: Any, quantization: str, plain: ModelPair, caplog: pytest.LogCaptureFixture) -> None:
    pair, sampling = packed(plain, quantization), Sampling(max_new_tokens=20)
    engines = (SpeculativeEngine(pair, 5), ReferenceEngine(pair), ReferenceEngine(pair, max_rows=1))
    ours, *others = (engine.generate(PROMPTS, policy, sampling, keep_teacher="hidden") for engine in engines)
    for theirs in others:
        same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.token_ids == b.token_ids]
        # 8 bits round activations too, so that a difference in float32's last digit becomes a step of 1/127.
        assert len(same) >= len(PROMPTS) - (quantization == "8bit")
        gaps = [torch.tensor(a.divergence).sub(torch.tensor(b.divergence)).abs() for a, b in same]
        assert torch.cat(gaps).median() < 1e-5
        assert quantization == "8bit" or torch.cat(gaps).max() < 1e-5
    assert not caplog.records  # bitsandbytes would warn at every layer of every forward


@BOTH
def test_what_it_says_of_a_text_does_not_depend_on_the_others(quantization: str, plain: ModelPair) -> None:
    teacher = packed(plain, quantization).teacher
    ids = torch.tensor([range(2, 22), range(40, 60)])
    alone, among = final_states(teacher, ids[:1]), final_states(teacher, ids)[:1]
    assert (alone - among).abs().median() < 1e-4
    assert 1e-3 < (alone - final_states(plain.teacher, ids[:1])).abs().median() < 0.5


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
@pytest.mark.parametrize("engine", [SpeculativeEngine, ReferenceEngine])
def test_other_precisions(engine: Any, dtype: str, quantization: str, plain: ModelPair) -> None:
    rollouts = engine(packed(plain, quantization, dtype)).generate(
        PROMPTS, Switch(threshold=0.3), Sampling(9), keep_teacher="hidden"
    )
    kept = {"bfloat16": torch.bfloat16, "auto": torch.float32}[dtype]
    assert {r.teacher_hidden.dtype for r in rollouts} == {kept}
    assert all(r.teacher_hidden.shape == (len(r.token_ids), 64) for r in rollouts)


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_stays_plain_and_all_parameters_count(tied: bool, quantization: str, tmp_path: Path) -> None:
    model = tiny_pair("llama", hidden=64, tie_word_embeddings=tied).student
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), quantization=quantization)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    assert parameter_count(loaded) == parameter_count(model)


@BOTH
@pytest.mark.parametrize("method", ["switch", "kd"])
def test_a_student_learns_from_it_nearly_as_from_the_plain_one(
    method: str, quantization: str, plain: ModelPair, tmp_path: Path
) -> None:
    losses = []
    for pair in (plain, packed(plain, quantization)):
        trainer = make_trainer(tmp_path, pair, method=method, threshold=0.3, logging_steps=1)
        assert f" ({rounded(parameter_count(plain.teacher))}): 3 steps" in trainer.describe()
        trainer.train()
        losses.append([line["loss"] for line in history(trainer) if "loss" in line])
    assert len(losses[1]) == 3
    # Only at the first step: after it the students differ, and so does their text.
    assert 0 < abs(losses[1][0] - losses[0][0]) < 0.25 * losses[0][0]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_it_is_not_offloaded(offload: str, plain: ModelPair, tmp_path: Path) -> None:
    pair = packed(plain, "4bit")
    backbone(pair.teacher).register_forward_pre_hook(lambda *call: pytest.fail("a forward before the refusal"))
    with pytest.raises(UserError, match=f"teacher_offload is '{offload}', but quantized weights stay where"):
        make_trainer(tmp_path, pair, method="switch", teacher_offload=offload)
