"""Process groups for tests. One Python imports everything and forks the processes of each group: an import costs seconds."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def run_script(script: str, *arguments: object) -> None:
    """Run a test file as a script, which then forks its groups; its output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


def run_group(folder: Path, count: int, work: Callable[[int], None]) -> None:
    """Call `work(rank)` in `count` forked processes, a gloo group, in torchrun's environment but for the port.

    Where one fails the others are ended, since they would wait for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # accelerate collects garbage before every training, which takes half of a short one; what is there by now stays.
    gc.collect()
    gc.freeze()
    running = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _be_process(folder, rank, count, work)
        running.add(pid)
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(status) and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    if failed:
        sys.exit(1)


def _be_process(folder: Path, rank: int, count: int, work: Callable[[int], None]) -> None:
    try:
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        # They meet in a file: a port that was free when it was chosen may be another process's by the time it is used.
        meeting_point = f"file://{folder.resolve()}-meeting-point"
        torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=count)
        work(rank)
        _leave(folder, rank, count)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _leave(folder: Path, rank: int, count: int) -> None:
    """End this process once all have done their work, without the interpreter's teardown.

    There gloo's threads have aborted a process that had done everything (signal 6, "terminate called without an active exception").
    """
    (folder / f"done-{rank}").touch()
    deadline = time.monotonic() + 60
    while not all((folder / f"done-{each}").exists() for each in range(count)):
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.05)
    os._exit(0)
