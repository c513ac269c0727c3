"""One process equals two under DeepSpeed, whose ZeRO takes apart the optimizer's state, the gradients too, or the weights too.

It is no dependency, so these run where it is: `DS_BUILD_OPS=0 pip install deepspeed`, `pytest -m slow tests/test_deepspeed.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import run_group, run_script
from test_distributed import METHODS, OF_PARTS, ROWS, make_pair, make_trainer
from trainers import TIMINGS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.slow,
]

STAGES = (1, 2, 3)
# By name: the family, whose head is tied to the embedding or not, the method, and the micro-batches of a step.
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "gkd": ("llama", METHODS["gkd"], 1),
    "kd": ("llama", OF_PARTS["kd"], 2),
    "tied": ("qwen2", METHODS["switch"], 1),
}
HALVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def zero(stage: int) -> dict[str, Any]:
    """What accelerate makes of a recipe, but for the size below which ZeRO-3 leaves weights whole: here all would be."""
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(automatic, "auto"),
    }


def train_all(folder: Path, rows: int, **options: Any) -> None:
    """Three steps and an evaluation of each run, `rows` a process and step."""
    for name, (family, method, micro_batches) in RUNS.items():
        split = {"rows_a_process": rows // micro_batches, "gradient_accumulation_steps": micro_batches}
        trainer = make_trainer(make_pair(family), folder / name, ROWS.get(name, 22), **split, **method, **options)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            (folder / name / "log.json").write_text(json.dumps(trainer.state.log_history))


def go_on(folder: Path, stage: int) -> None:
    """Four steps with a checkpoint after two, and the last two again from there."""
    for begun, run in ((None, "whole"), (str(folder / "whole" / "checkpoint-2"), "resumed")):
        options = {**METHODS["switch"], **HALVES, "deepspeed": zero(stage)}
        trainer = make_trainer(make_pair(), folder / run, 22, 4, **options)
        trainer.train(resume_from_checkpoint=begun)
        trainer.save_model()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_script(__file__, folder)
    return folder


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_the_same_model_as_one(stage: int, run: str, runs: Path) -> None:
    ours, theirs = runs / "one" / run, runs / f"zero{stage}" / run
    one, two = (json.loads((folder / "log.json").read_text()) for folder in (ours, theirs))
    for our_line, their_line in zip(one, two, strict=True):
        # Tokens, so exact: the same text was written by the same model.
        for key in ("teacher_share", "response_tokens", "ended"):
            assert our_line.get(key) == their_line.get(key)
        for key in our_line.keys() & their_line.keys():
            if not any(skipped in key for skipped in (*TIMINGS, "flos", "_forwards", "generated_tokens")):
                # DeepSpeed sums gradients, and steps, in float32.
                assert our_line[key] == pytest.approx(their_line[key], rel=1e-5), key
    same_weights(ours, theirs)


def same_weights(ours: Path, theirs: Path) -> None:
    first, second = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert first.keys() == second.keys()
    for name in first:
        assert second[name].dtype == torch.float64
        # The weights that DeepSpeed steps are float32: each of up to four steps rounds one below 2 by up to 6e-8.
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_the_same_number_of_processes(stage: int, runs: Path) -> None:
    same_weights(runs / f"zero{stage}" / "whole", runs / f"zero{stage}" / "resumed")


def be_two(folder: Path, stage: int) -> None:
    import deepspeed

    # Its own sum over processes that share memory would be compiled first, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train_all(folder, 4, deepspeed=zero(stage))
    go_on(folder, stage)


if __name__ == "__main__":
    runs_folder = Path(sys.argv[1])
    os.environ["DS_ACCELERATOR"] = "cpu"
    for number in STAGES:
        at = runs_folder / f"zero{number}"
        run_group(at, 2, lambda rank, at=at, number=number: be_two(at, number))
    train_all(runs_folder / "one", 8)
