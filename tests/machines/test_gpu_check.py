"""The script for whoever has a GPU, run on this CPU; and the formula of docs/gpu.md against tensors that were counted."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from switchkd.models.pair import ModelPair
from switchkd.models.placement import placement_of
from switchkd.records import Prompt, Sampling
from switchkd.rollout.blends import Mix
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_pair
from trainers import NEW_TOKENS, Gradients, make_trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.main(["--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("gpu-check: torch finds no GPU here")
    assert len(err.splitlines()) == 2


def test_it_runs_on_a_cpu(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--device", "cpu", "--size", "tiny", "--rows", "4", "--tokens", "12"]
    assert gpu_check.main(small) == 0
    out = capsys.readouterr().out
    assert "on cpu in float32: 4/4 texts are the same by both engines" in out
    assert "under bfloat16 autocast" in out
    assert "3 training steps" in out
    assert "MiB by the formula" in out


# ---------------------------------------------------------------------------------------------------- memory by formula


def size_of(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_weights_gradients_and_optimizer(gpu_check: Any, tmp_path: Path) -> None:
    gradients = Gradients()
    trainer = make_trainer(tmp_path, tiny_pair("qwen2"), callbacks=[gradients], max_steps=1, use_cpu=True)
    trainer.train()
    pair, optimizer = trainer.pair, trainer.optimizer
    assert optimizer is not None
    assert pair.teacher is not None
    parts = gpu_check.bytes_by_part(pair, rows=8, slots=32, tokens=10)
    assert parts["student weights"] == size_of(pair.student.parameters())
    assert parts["teacher weights"] == size_of(pair.teacher.parameters())
    assert parts["gradients"] == sum(gradient.nbytes for gradient in gradients.steps[0].values())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["optimizer"] == size_of(moments)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_caches_and_kept_states(gpu_check: Any, family: str, precision: str) -> None:
    made, place = tiny_pair(family), placement_of(device="cpu", precision=precision)
    assert made.teacher is not None
    pair = ModelPair(made.student, made.teacher.to(place.teacher_dtype), autocast_dtype=place.autocast_dtype)
    rows, width, block = 5, 7, 3
    prompts = [Prompt(tuple(range(2 + row, 2 + row + width)), row) for row in range(rows)]
    found: dict[int, int] = {}

    def count(done: int) -> None:
        # The caches of both models are the only tensors with a slot for each position.
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.ndim == 4 and each.shape[0] == rows and each.shape[2] == slots:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()

    slots = width + NEW_TOKENS + block
    engine = SpeculativeEngine(pair, block, max_rows=rows)
    with pair.computing():
        texts = engine.generate(prompts, Mix(0.5), Sampling(NEW_TOKENS), keep_teacher="hidden", on_progress=count)
    parts = gpu_check.bytes_by_part(pair, rows=rows, slots=slots, tokens=NEW_TOKENS)
    assert sum(found.values()) == parts["student cache"] + parts["teacher cache"]
    # Of a text that ended earlier there are fewer.
    kept = {text.teacher_hidden.nbytes / len(text.token_ids) for text in texts if text.teacher_hidden is not None}
    assert kept == {parts["kept teacher states"] / rows / NEW_TOKENS}
