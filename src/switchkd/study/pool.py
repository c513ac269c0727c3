"""The runs of a study over the cores: a process for each, as many at a time as there are workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from switchkd.errors import Stopped
from switchkd.files import write_atomically
from switchkd.study.plan import StudyRun
from switchkd.study.progress import StudyProgress
from switchkd.study.rows import ROW_FILE, RUNS

SPEC_FILE, OUTPUT_FILE = "study_run.json", "output.txt"
# Runs share nothing, so a thread for each gives the most of all cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result, why, and the file with all that it said."""

    row: StudyRun
    reason: str
    output: Path


class _Worker:
    """A process at work on a run."""

    def __init__(self, row: StudyRun, folder: Path, *, keep_model: bool) -> None:
        self.row = row
        self.folder = folder
        self.output = folder / OUTPUT_FILE
        write_atomically(folder / SPEC_FILE, json.dumps({"row": asdict(row), "keep_model": keep_model}) + "\n")
        with self.output.open("a", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "switchkd.study.worker", str(folder / SPEC_FILE)],
                env=os.environ | _ONE_THREAD,
                # Closed when this process ends, however it does: the worker then ends as well.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # What ends this process's session, such as a terminal that is closed, leaves it the time to save.
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Whether the process is gone; its pipe is then closed."""
        ended = self.process.poll() is not None
        if ended and self.process.stdin is not None:
            self.process.stdin.close()
        return ended

    def failure(self) -> Failure | None:
        """Why the ended process left no row; None where it left one."""
        if self.process.returncode == 0 and (self.folder / ROW_FILE).is_file():
            return None
        lines = [
            line for line in self.output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        reason = lines[-1] if lines else f"exit code {self.process.returncode}, and not a word"
        if self.process.returncode < 0:
            killed_by = signal.Signals(-self.process.returncode).name
            reason = f"it was ended by {killed_by}" + (", often for lack of memory" if killed_by == "SIGKILL" else "")
        return Failure(self.row, reason, self.output)


def run_all(
    rows: Sequence[StudyRun], folder: Path, workers: int, progress: StudyProgress, *, keep_models: bool
) -> list[Failure]:
    """Carry out the runs, at most `workers` at a time, in their order; return those that failed.

    `progress` is told each start and end. Raises Stopped on Ctrl-C or SIGTERM, when the runs in flight have finished their step
    and saved.
    """
    waiting, at_work, failures = list(rows), list[_Worker](), list[Failure]()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or at_work:
            while waiting and len(at_work) < workers:
                row = waiting.pop(0)
                place = place_of(row, folder / RUNS)
                place.mkdir(parents=True, exist_ok=True)
                at_work.append(_Worker(row, place, keep_model=keep_models))
                progress.started(row, place)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for worker in [each for each in at_work if each.has_ended()]:
                at_work.remove(worker)
                failure = worker.failure()
                failures += [failure] if failure else []
                progress.ended(worker.row, failure.reason if failure else None)
            progress.look()
    except KeyboardInterrupt:
        progress.say("Stopping: each run finishes its step and saves. Press Ctrl-C to stop at once.")
        _stop(at_work)
        left = len(waiting) + len(at_work)
        raise Stopped(f"stopped with {left} of {len(rows)} runs left; the same command goes on with them") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return failures


def place_of(row: StudyRun, runs: Path) -> Path:
    """The run's folder; one that was begun under an earlier name goes on there."""
    return next(iter(sorted(runs.glob(f"*{row.identity[:8]}"))), runs / row.folder_name)


def _stop(at_work: Sequence[_Worker]) -> None:
    """Have every worker finish its step and save; a second Ctrl-C ends them at once."""
    try:
        for worker in at_work:
            worker.process.send_signal(signal.SIGTERM)
        for worker in at_work:
            worker.process.wait()
            worker.has_ended()
    except KeyboardInterrupt:
        for worker in at_work:
            worker.process.kill()
