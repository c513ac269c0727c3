"""One process equals two: data parallelism changes neither what is rolled out nor the gradient, and no process is left behind."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.run.callbacks import StopCleanly
from switchkd.training.checkpoints import last_complete_checkpoint
from switchkd.training.trainer import SwitchTrainer
from tiny import tiny_pair
from trainers import TIMINGS, make_examples

METHODS: dict[str, dict[str, Any]] = {
    "switch": {"method": "switch", "threshold": 0.3},
    "gkd": {"method": "gkd", "student_share": 0.5},
    "auto": {"method": "switch", "threshold": {"name": "auto", "prompts": 12, "every": 2}},
    # Full after the first step: half of the second's sequences are replayed, from what either process wrote.
    "replay": {"method": "switch", "threshold": 0.3, "replay_capacity": 8},
    "distillm2": {"method": "distillm2"},
    "seqkd": {"method": "seqkd"},
}
# In steps of 8 the third has 6 rows: 4 and 2 of them for two processes. Of 17 it has one, and the other process none.
ROWS = dict.fromkeys(METHODS, 22) | {"gkd": 17}
EVAL_ROWS = 9
PROCESSES = 2


def make_pair() -> ModelPair:
    # In float32 AdamW's first steps, which divide a gradient by its own size, make 1e-4 of the rounding of a gradient near 0.
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    # Several ids end a text, so that the processes hold different counts of tokens.
    pair.student.generation_config.eos_token_id = list(range(1, 12))
    return pair


def make_trainer(pair: ModelPair, folder: Path, rows: int, rows_a_process: int, **options: Any) -> SwitchTrainer:
    args = SwitchConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows_a_process,
        per_device_eval_batch_size=4,
        **{
            "max_new_tokens": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    student = copy.deepcopy(pair.student)
    return SwitchTrainer(student, pair.teacher, args, make_examples(rows), make_examples(EVAL_ROWS, seed=1))


def train_each_method(folder: Path, rows_a_process: int) -> None:
    """Three steps and an evaluation with each method; leaves every run's weights and log in a folder of its own."""
    pair = make_pair()
    for name, method in METHODS.items():
        trainer = make_trainer(pair, folder / name, ROWS[name], rows_a_process, **method)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            (folder / name / "log.json").write_text(json.dumps(trainer.state.log_history))
            replay = trainer._text.replay
            kept = [] if replay is None else [(r.prompt.sample_id, r.prompt.prompt_id) for r in replay.rollouts]
            (folder / name / "replay.json").write_text(json.dumps(kept))


class Terminated(TrainerCallback):
    """SIGTERM to this process alone, in its second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


class Broken:
    """An engine of a process that cannot write."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk of this process is gone")


def meet_trouble(folder: Path, rank: int) -> None:
    """What befalls the second process alone: a signal in training, and a failure in writing the teacher's text."""
    pair = make_pair()
    trainer = make_trainer(pair, folder / "stopped", 24, 4, method="sft", max_steps=6)
    stopper = StopCleanly(Console(stderr=True))
    trainer.add_callback(stopper)
    if rank == 1:
        trainer.add_callback(Terminated())
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert stopper.stopped
    assert signal.getsignal(signal.SIGTERM) is before
    (folder / f"stopped-{rank}").write_text(str(trainer.state.global_step))

    writer = make_trainer(pair, folder / "broken", 8, 4, method="seqkd")
    if rank == 1:
        writer.engine = Broken()
    try:
        writer.train()
    except (UserError, OSError) as error:
        (folder / f"broken-{rank}").write_text(f"{type(error).__name__}: {error}")


def leave(folder: Path, rank: int) -> None:
    """End this process once all have done their work, without the interpreter's teardown.

    There gloo's threads have aborted a process that had done everything (signal 6, "terminate called without an active exception").
    """
    (folder / f"done-{rank}").touch()
    deadline = time.monotonic() + 60
    while not all((folder / f"done-{each}").exists() for each in range(PROCESSES)):
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.05)
    os._exit(0)


@contextmanager
def launched(folder: Path, rows_a_process: int) -> Iterator[None]:
    """Beside the block this file runs as a script in `PROCESSES` processes, in torchrun's environment but for the port."""
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
    yield
    errors = [process.communicate(timeout=250)[1][-3000:] for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(errors)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders "one" and "two". Costs two starts of Python with torch and transformers: nothing less runs the gathering."""
    folder = tmp_path_factory.mktemp("runs")
    with launched(folder / "two", rows_a_process=8 // PROCESSES):
        train_each_method(folder / "one", rows_a_process=8)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_same_model_as_one(method: str, runs: Path) -> None:
    one, two = (json.loads((runs / run / method / "log.json").read_text()) for run in ("one", "two"))
    # Three steps, the end and the evaluation; and the threshold before steps 0 and 2.
    assert len(one) == len(two) == (7 if method == "auto" else 5)
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        # Tokens, so exact: the same text was written by the same model.
        for key in ("teacher_share", "response_tokens", "ended"):
            assert ours.get(key) == theirs.get(key)
        for key in ours:
            # transformers adds losses up in float32. The operations are counted by process, and each process calibrates.
            if not any(skipped in key for skipped in (*TIMINGS, "flos", "_forwards", "generated_tokens")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    first, second = (load_file(runs / run / method / "model.safetensors") for run in ("one", "two"))
    for name in first:
        # Float64 sums over eight rows or over two times four. A step moves a weight by up to the learning rate, 1e-3.
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-9)


def test_rows_that_fill_up_a_step_are_kept_once(runs: Path) -> None:
    one, two = (json.loads((runs / run / "replay" / "replay.json").read_text()) for run in ("one", "two"))
    assert one == two
    assert len({tuple(address) for address in one}) == len(one) == 8


def test_the_teacher_writes_the_same_file_in_two_processes(runs: Path) -> None:
    for name in ("teacher_text.jsonl", "teacher_text.manifest.json"):
        assert (runs / "one" / "seqkd" / name).read_bytes() == (runs / "two" / "seqkd" / name).read_bytes()


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs: Path) -> None:
    assert [(runs / "two" / f"stopped-{rank}").read_text() for rank in range(PROCESSES)] == ["2", "2"]
    assert last_complete_checkpoint(runs / "two" / "stopped") == runs / "two" / "stopped" / "checkpoint-2"


def test_a_process_that_cannot_write_the_teachers_text_tells_the_others(runs: Path) -> None:
    said = [(runs / "two" / f"broken-{rank}").read_text() for rank in range(PROCESSES)]
    assert said[0].startswith("UserError: process 1 could not write the teacher's text (OSError: the disk")
    assert said[1] == "OSError: the disk of this process is gone"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rows_a_process = Path(sys.argv[1]), int(sys.argv[2])
    # They meet in a file: a port that was free when it was chosen may be another process's by the time it is used.
    meeting_point = f"file://{folder.resolve()}-meeting-point"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting_point, rank=int(os.environ["RANK"]), world_size=PROCESSES
    )
    train_each_method(folder, rows_a_process)
    meet_trouble(folder, int(os.environ["RANK"]))
    leave(folder, int(os.environ["RANK"]))
