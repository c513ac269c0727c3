"""One process equals two: data parallelism changes neither what is rolled out nor the gradient."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from switchkd.methods.config import SwitchConfig
from switchkd.training.trainer import SwitchTrainer
from tiny import tiny_pair
from trainers import EXAMPLES, TIMINGS, make_examples

METHODS: dict[str, dict[str, Any]] = {
    "switch": {"method": "switch"},
    "gkd": {"method": "gkd", "student_share": 0.5},
    "auto": {"method": "switch", "threshold": {"name": "auto", "prompts": 12, "every": 2}},
    # Full after the first step: half of the second's sequences are replayed, from what either process wrote.
    "replay": {"method": "switch", "replay_capacity": 8},
    "distillm2": {"method": "distillm2"},
    "seqkd": {"method": "seqkd"},
}
PROCESSES = 2


def train_each_method(folder: Path, rows_a_process: int) -> None:
    """Three steps and an evaluation with each method; leaves every run's weights and log in a folder of its own."""
    pair = tiny_pair("llama")
    # Several ids end a text, so that the processes hold different counts of tokens.
    pair.student.generation_config.eos_token_id = list(range(1, 12))
    for name, method in METHODS.items():
        args = SwitchConfig(
            output_dir=str(folder / name),
            max_new_tokens=8,
            max_steps=3,
            learning_rate=1e-3,
            per_device_train_batch_size=rows_a_process,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **method,
        )
        trainer = SwitchTrainer(copy.deepcopy(pair.student), pair.teacher, args, make_examples(24), EXAMPLES)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            (folder / name / "log.json").write_text(json.dumps(trainer.state.log_history))


def launch(folder: Path, rows_a_process: int) -> None:
    """This file as a script in `PROCESSES` processes, with the environment that torchrun gives, but for the port."""
    shared = {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rows_a_process)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    errors = [process.communicate(timeout=250)[1][-3000:] for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(errors)


def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    """Costs two starts of Python with torch and transformers: nothing less runs the gathering and the averaging."""
    launch(tmp_path / "two", rows_a_process=8 // PROCESSES)
    train_each_method(tmp_path / "one", rows_a_process=8)
    for method in METHODS:
        one, two = (json.loads((tmp_path / run / method / "log.json").read_text()) for run in ("one", "two"))
        # Three steps, the end and the evaluation; and the threshold before steps 0 and 2.
        assert len(one) == len(two) == (7 if method == "auto" else 5)
        for ours, theirs in zip(one, two, strict=True):
            assert ours.keys() == theirs.keys()
            # Tokens, so exact: the same text was written by the same model.
            for key in ("teacher_share", "response_tokens", "ended"):
                assert ours.get(key) == theirs.get(key)
            for key in ours:
                # Float32 sums over eight rows or over two times four, and AdamW's first steps, which divide a gradient by
                # its own size, carry the rounding on. The operations are counted by process.
                if not any(skipped in key for skipped in (*TIMINGS, "flos")):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        first, second = (load_file(tmp_path / run / method / "model.safetensors") for run in ("one", "two"))
        for name in first:
            # A step moves a weight by up to the learning rate, 1e-3: equal to a hundredth of one step.
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rows_a_process = Path(sys.argv[1]), int(sys.argv[2])
    # They meet in a file: a port that was free when it was chosen may be another process's by the time it is used.
    meeting_point = f"file://{folder.resolve()}-meeting-point"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting_point, rank=int(os.environ["RANK"]), world_size=PROCESSES
    )
    train_each_method(folder, rows_a_process)
    torch.distributed.destroy_process_group()
