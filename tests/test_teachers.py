"""Teachers that cost less memory give what the plain ones give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.errors import UserError
from switchkd.models.heads import backbone
from switchkd.models.load import load_model
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout.law import Teacher
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.training.teachers import TeacherPlace, self_teacher
from tiny import tiny_model, tiny_pair
from trainers import assert_same_weights, make_trainer, weights

PROMPTS = [[5, 6, 7], [9]]


def adapted(**options: Any) -> Any:
    """A model with an adapter that changes what it says."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False, **options
    )
    return peft.get_peft_model(tiny_model("llama", seed=3, dtype=torch.float64), config)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("engine", [ReferenceEngine, SpeculativeEngine])
def test_the_student_without_its_adapter_is_the_base_model(engine: Any, options: dict[str, Any]) -> None:
    student = adapted(**options)
    if options:
        student.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    plain = tiny_model("llama", seed=3, dtype=torch.float64)
    sampling = Sampling(12)
    for policy in (Switch(threshold=0.01), Teacher()):
        own = engine(ModelPair(student, self_teacher(student))).generate(
            PROMPTS, policy, sampling, keep_teacher="hidden"
        )
        other = engine(ModelPair(student, plain)).generate(PROMPTS, policy, sampling, keep_teacher="hidden")
        assert [r.token_ids for r in own] == [r.token_ids for r in other]
        assert max(own[0].divergence) > 0.01
        for ours, theirs in zip(own, other, strict=True):
            assert torch.equal(ours.teacher_hidden, theirs.teacher_hidden)


def test_asking_the_self_teacher_leaves_the_student_as_it_was() -> None:
    student = adapted().train()
    trains = [name for name, each in student.named_parameters() if each.requires_grad]
    teacher = self_teacher(student)
    assert list(teacher.parameters()) == []
    teacher.eval().requires_grad_(False)
    backbone(teacher)(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    assert student.training
    assert [name for name, each in student.named_parameters() if each.requires_grad] == trains != []
    assert not any(getattr(layer, "disable_adapters", None) is True for layer in student.modules())


def test_a_run_learns_from_the_student_without_its_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = []
    for teacher in ("self", tiny_pair("llama").student):
        pair = tiny_pair("llama")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path, pair, teacher_model=teacher, method="switch", threshold=0.01, peft_config=config
        )
        trainer.train()
        trained.append(weights(trainer))
    assert_same_weights(*trained)


def test_self_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none; give peft_config"):
        make_trainer(tmp_path, tiny_pair("llama"), teacher_model="self")


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["switch", "kd"])
def test_offloading_the_teacher_changes_no_weight(method: str, offload: str, tmp_path: Path) -> None:
    trained = []
    for place in ("none", offload):
        pair = tiny_pair("llama")
        trainer = make_trainer(tmp_path, pair, method=method, teacher_offload=place, eval_dataset=None)
        trainer.train()
        trained.append(weights(trainer))
    assert_same_weights(*trained)
    assert pair.teacher is not None
    held = sum(each.numel() for each in pair.teacher.parameters())
    head = pair.teacher.get_output_embeddings().weight.numel()
    # On a machine without another device "cpu" is where they are anyway.
    assert (held == head) == (offload == "disk")
    assert any(tmp_path.glob("_teacher-*")) == (offload == "disk")
    del trainer, pair


def test_heads_prove_themselves_before_the_teacher_leaves(tmp_path: Path) -> None:
    """With an engine of the user's, nothing else has asked for the heads."""
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method="kd", teacher_offload="disk", engine=object())
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_place_may_be_entered_twice_and_leaves_no_file(tmp_path: Path) -> None:
    teacher = tiny_model("gpt2")
    expected = {name: each.clone() for name, each in teacher.state_dict().items()}
    place = TeacherPlace(teacher, "disk", torch.device("cpu"), tmp_path)
    with place.loaded():
        with place.loaded():
            pass
        assert all(torch.equal(each, expected[name]) for name, each in teacher.state_dict().items())
    assert next(iter(place._moved.values())).numel() == 0
    del place
    assert list(tmp_path.iterdir()) == []


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    for pair in (tiny_pair("llama"), ModelPair(tiny_pair("llama").student)):
        with pytest.raises(UserError, match="teacher_offload is 'gpu'; choose one of none, cpu, disk"):
            make_trainer(tmp_path, pair, method="sft", teacher_offload="gpu")
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="choose 8bit or 4bit"):
        load_model(str(tmp_path), quantization="3bit")


def test_what_cannot_be_packed_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UserError, match="4bit weights need safetensors; save it to a folder"):
        load_model(str(tmp_path / "x.gguf"), quantization="4bit")
    monkeypatch.setattr("switchkd.models.load.find_spec", lambda name: None)
    with pytest.raises(UserError, match="8bit weights need bitsandbytes, which is not installed: pip install"):
        load_model(str(tmp_path), quantization="8bit")
