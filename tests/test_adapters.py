"""Adapters that a run merges or keeps, and students whose packed weights stay frozen under one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from runs import save, switchkd, write_run
from tiny import EOS_ID, tiny_pair, tiny_tokenizer

pytest.importorskip("peft")
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[5, 9, 30, 31]])


def logits_of(folder: Path) -> torch.Tensor:
    """As transformers alone loads the model."""
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    return logits


def test_a_kept_adapter_is_the_merged_model_in_two_parts(models: Path, tmp_path: Path) -> None:
    run = {"method": "kd", "peft": LORA, "max_steps": 3, "learning_rate": 5e-3, "save_strategy": "no"}
    for adapter in ("keep", "merge"):
        (tmp_path / adapter).mkdir()
        assert switchkd("train", write_run(models, tmp_path / adapter, adapter=adapter, **run)) == 0
    kept, merged = (tmp_path / adapter / "out" for adapter in ("keep", "merge"))
    # Two products in place of one: float32.
    torch.testing.assert_close(logits_of(kept), logits_of(merged), rtol=1e-4, atol=1e-4)
    assert (logits_of(kept) - logits_of(models / "student")).abs().max() > 0.1
    assert not (kept / "model.safetensors").exists()
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(models / "student")
    # transformers 5.16 reads an id back as a list of one.
    assert GenerationConfig.from_pretrained(kept).eos_token_id in (EOS_ID, [EOS_ID])
    # It is a model like any other for our own commands.
    data = models / "data.jsonl"
    assert switchkd("eval", kept, "--sets", data, "--limit", "2", "--seeds", "1", "--max-new-tokens", "4") == 0


def test_an_adapters_folder_is_no_student(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"method": "kd", "max_steps": 1, "save_strategy": "no"}
    assert switchkd("train", write_run(models, tmp_path, peft=LORA, adapter="keep", **run)) == 0
    kept = str((tmp_path / "out").rename(tmp_path / "kept"))
    for peft, said in ((LORA, "peft would replace that adapter"), (None, "nothing of the student can be trained")):
        capsys.readouterr()
        assert switchkd("train", write_run(models, tmp_path, student=kept, peft=peft, **run)) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_the_earlier_stages_of_a_run_merge(models: Path, tmp_path: Path) -> None:
    stages = [{"method": "kd"}, {"method": "gkd"}]
    path = write_run(models, tmp_path, method=None, peft=LORA, adapter="keep", max_steps=1, stages=stages)
    assert switchkd("train", path) == 0
    first = tmp_path / "out" / "1-kd"
    assert (first / "model.safetensors").exists()
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(first)


def test_a_kept_adapter_names_a_base_model_that_anybody_can_load(models: Path, tmp_path: Path) -> None:
    run = {
        "student": "world:student",
        "teacher": None,
        "method": "sft",
        "peft": LORA,
        "adapter": "keep",
        "max_steps": 1,
    }
    path = write_run(models, tmp_path, **run, max_prompt_tokens=64, max_new_tokens=32)
    assert switchkd("train", path) == 0
    assert logits_of(tmp_path / "out").shape[:2] == IDS.shape


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"peft": None, "adapter": "keep"}, "adapter is keep, but no adapter is trained"),
        ({"peft": None, "student_quantization": "4bit"}, "student_quantization is 4bit, but no adapter is trained"),
        ({"student_quantization": "4bit"}, "adapter is merge, which would round what was learned to the 4bit"),
        ({"adapter": "keep", "student_drop_layers": "1"}, "without the layers of student_drop_layers"),
        ({"adapter": "both"}, "adapter is 'both' (in"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused(
    changes: dict[str, Any], refusal: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switchkd("train", write_run(models, tmp_path, **{"peft": LORA, **changes})) == 2
    assert refusal in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_packed_student_learns_through_its_adapter(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # A hidden size of 64 fills one block of 4-bit weights.
    pair, tokenizer = tiny_pair("llama", hidden=64), tiny_tokenizer()
    for role, model in pair.models.items():
        save(model, tokenizer, tmp_path / role)
    rows = [{"prompt": f"one w{30 + n}", "completion": f"sun w{30 + n}"} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"method": "gkd", "peft": LORA, "adapter": "keep", "student_quantization": bits, "save_strategy": "no"}
    run |= {"max_steps": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "temperature": 0.0}
    assert switchkd("train", write_run(tmp_path, tmp_path, **run)) == 0
    events = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    packed = {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()}
    assert torch.float32 in packed
