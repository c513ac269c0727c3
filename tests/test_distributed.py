"""One process equals two: data parallelism changes neither what is rolled out nor the gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Trains tiny models for three steps of eight rows; each run leaves its log and its weights in a folder.
SCRIPT = """
import copy, json, sys
from pathlib import Path
import torch
from switchkd.config import SwitchConfig
from switchkd.trainer import SwitchTrainer
from test_trainer import EXAMPLES, make_examples
from tiny import tiny_pair

torch.set_num_threads(1)
RUNS = {"switch": {"method": "switch"}, "gkd": {"method": "gkd", "student_share": 0.5}}
pair = tiny_pair("llama")
# Several ids end a text, so that the processes hold different counts of tokens.
pair.student.generation_config.eos_token_id = list(range(1, 12))
for name, method in RUNS.items():
    args = SwitchConfig(
        output_dir=sys.argv[1] + "/" + name,
        max_new_tokens=8,
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=int(sys.argv[2]),
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
        Path(args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
"""
TIMINGS = ("per_second", "runtime", "flos")


def launch(folder: Path, script: Path, processes: int) -> None:
    """Run the script with eight rows a step over so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        command = [sys.executable]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script), str(folder), str(8 // processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    """Costs three starts of Python with torch and transformers: nothing less runs the gathering and the averaging."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        launch(tmp_path / str(processes), script, processes)
    for method in ("switch", "gkd"):
        one, two = (json.loads((tmp_path / folder / method / "log.json").read_text()) for folder in "12")
        assert len(one) == len(two) == 5
        for ours, theirs in zip(one, two, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                if any(timing in key for timing in TIMINGS):
                    continue
                # Float32 sums over eight rows or over two times four: losses and norms of up to 10, and AdamW's first
                # steps, which divide a gradient by itself, carry the rounding over.
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
            # Counted in tokens, so exact: the same text was written by the same model.
            for key in ("teacher_share", "response_tokens", "ended"):
                assert ours.get(key) == theirs.get(key)
        first, second = (load_file(tmp_path / folder / method / "model.safetensors") for folder in "12")
        for name in first:
            # A step is at most the learning rate, 1e-3; three of them agree to a hundredth of one.
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)
