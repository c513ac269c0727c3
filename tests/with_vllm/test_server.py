"""A run that trains with a server's rollouts, whose server is killed in the middle, and that goes on with a new one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from switchkd.errors import Unreachable
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout
from tiny import tiny_pair
from trainers import history, make_trainer

pytest.importorskip("vllm")

STEPS = 4
EXAMPLES = [Example(Prompt((5 + row, 9, 11 + row), row), ()) for row in range(8)]


@contextmanager
def server_of(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The documented command, on a free port, and the address that it says."""
    command = [sys.executable, "-m", "switchkd", "serve", "--teacher", str(folder / "teacher"), "--student"]
    command += [str(folder / "student"), "--port", "0", "--max-tokens", "64", "--cache-gib", "0.1", "--block-size", "3"]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving at (http://\S+);", line):
                yield found[1], process
                return
        pytest.fail((folder / "server.log").read_text()[-2000:])
    finally:
        process.kill()
        process.wait(timeout=30)
        log.close()
        if process.stdout is not None:
            process.stdout.close()


class KilledAt:
    """An engine whose server is killed before the call of that number."""

    def __init__(self, engine: Any, process: subprocess.Popen[str], call: int) -> None:
        self.engine, self.process, self.left = engine, process, call

    def generate(self, prompts: Sequence[Prompt], *given: Any, **named: Any) -> list[Rollout]:
        self.left -= 1
        if not self.left:
            self.process.kill()
            self.process.wait(timeout=30)
        rollouts: list[Rollout] = self.engine.generate(prompts, *given, **named)
        return rollouts


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in history(trainer) if "loss" in line]


@pytest.mark.timeout(900)
def test_a_killed_server_stops_the_run_cleanly_and_a_new_one_takes_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchkd.serving.connection.time.sleep", lambda seconds: None)
    pair: ModelPair = tiny_pair("llama", hidden=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    for role, model in pair.models.items():
        model.save_pretrained(tmp_path / role)
    options: dict[str, Any] = {"teacher_signal": {"top_k": 16}, "max_steps": STEPS, "use_cpu": True}
    ours = make_trainer(tmp_path / "ours", pair, EXAMPLES, **options)
    ours.train()
    with server_of(tmp_path) as (url, process):
        broken = make_trainer(tmp_path / "run", pair, EXAMPLES, vllm=url, **options)
        broken.engine = KilledAt(broken.engine, process, 3)
        with pytest.raises(Unreachable, match="does not answer"):
            broken.train()
    assert broken.state.global_step == 2
    with server_of(tmp_path) as (url, _):
        resumed = make_trainer(tmp_path / "run", pair, EXAMPLES, vllm=url, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        version = resumed.engine._version  # type: ignore[attr-defined]
    assert resumed.state.global_step == STEPS
    # The new server has the weights of its folder, and was sent those of the checkpoint and of one more step.
    assert version == 2
    # The texts are equal, and so are the losses, to the rounding of vLLM's log-probabilities (test_engine.py).
    assert losses(resumed) == pytest.approx(losses(ours), rel=1e-3)
    # AdamW's step is the learning rate, 1e-3, whichever sign a gradient near 0 has: two of them in each direction a step.
    theirs = ours.pair.student.state_dict()
    for name, weight in resumed.pair.student.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2 * STEPS * 1e-3)
