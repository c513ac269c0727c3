"""What a study shows while it runs: how many runs are done, how far those in flight are, and how long the rest will take."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from switchkd.progress import progress_bar
from switchkd.report.terminal import duration
from switchkd.run.folder import LOG_FILE
from switchkd.study.plan import StudyRun
from switchkd.study.rows import ROW_FILE, TRAINING

# Where there is no bar, how far the runs in flight are is said this often.
_SECONDS_BETWEEN_NOTES = 600.0


class StudyProgress:
    """A bar over all runs with a note of those in flight on a terminal, and a line now and then elsewhere; a line for each end.

    Use in `with`. The estimate counts on a run that is left to take as long as those of its method, else as all that ended; before
    the first has ended, it goes by how far those in flight are. `to_train` are the runs that are not measured alone.
    """

    def __init__(self, console: Console, total: int, to_train: Sequence[StudyRun], workers: int) -> None:
        self.console = console
        self.workers = workers
        self.to_train = {row.identity: row for row in to_train}
        self.done = 0
        self.total = total
        self.in_flight: dict[str, tuple[StudyRun, Path, float]] = {}
        self.done_before: dict[str, float] = {}
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.bar = progress_bar(console)
        self.task = self.bar.add_task("runs", total=total)
        self.looked_at = 0.0
        self.noted_at = time.perf_counter()

    def __enter__(self) -> StudyProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def started(self, row: StudyRun, folder: Path) -> None:
        """Take in a run that has just begun."""
        self.in_flight[row.identity] = (row, folder, time.perf_counter())
        self.done_before[row.identity] = _part_done(row, folder)

    def ended(self, row: StudyRun, reason: str | None) -> None:
        """Say what came of a run; `reason` is why it failed, if it did."""
        _, folder, started_at = self.in_flight.pop(row.identity)
        took, done_before = time.perf_counter() - started_at, self.done_before.pop(row.identity)
        self.done += 1
        self.bar.update(self.task, completed=self.done)
        if row.identity in self.to_train:
            del self.to_train[row.identity]
            # One that went on from an earlier attempt says little of a whole one.
            if not reason and done_before == 0:
                self.seconds.setdefault((row.method, row.setting), []).append(took)
        outcome = f"failed: {reason}" if reason else _scores(folder / ROW_FILE)
        left = self.left()
        more = f"; about {duration(left)} left" if left and self.done < self.total else ""
        self.say(f"{self.done} of {self.total}  {row.name}: {outcome} ({duration(took)}){more}")

    def left(self) -> float | None:
        """Seconds that the study will still take; None while nothing tells."""
        parts = {identity: _part_done(row, folder) for identity, (row, folder, _) in self._training().items()}
        ended = [seconds for of_method in self.seconds.values() for seconds in of_method]
        whole = fmean(ended) if ended else self._whole_by_parts(parts)
        if whole is None:
            return None
        of_method = {key: fmean(seconds) for key, seconds in self.seconds.items()}
        left = sum(
            of_method.get((row.method, row.setting), whole) * (1 - parts.get(identity, 0.0))
            for identity, row in self.to_train.items()
        )
        return left / max(1, min(self.workers, len(self.to_train)))

    def look(self) -> None:
        """Note how far the runs in flight are, once a second."""
        if time.perf_counter() - self.looked_at < 1:
            return
        self.looked_at = time.perf_counter()
        notes = [
            f"{row.name} {_part_done(row, folder):.0%}" if row.identity in self.to_train else row.name
            for row, folder, _ in self.in_flight.values()
        ]
        if not notes:
            return
        left = self.left()
        self.bar.note = "; ".join(notes) + (f"; about {duration(left)} left" if left else "")
        if not self.console.is_terminal and self.looked_at - self.noted_at >= _SECONDS_BETWEEN_NOTES:
            self.noted_at = self.looked_at
            self.say(f"at work: {self.bar.note}")

    def _training(self) -> dict[str, tuple[StudyRun, Path, float]]:
        return {key: each for key, each in self.in_flight.items() if key in self.to_train}

    def _whole_by_parts(self, parts: dict[str, float]) -> float | None:
        """The seconds of a whole run, from how far the ones in flight have come."""
        wholes = [
            (time.perf_counter() - self.in_flight[identity][2]) / done
            for identity, part in parts.items()
            if (done := part - self.done_before[identity]) > 0.02
        ]
        return fmean(wholes) if wholes else None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _scores(path: Path) -> str:
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return ", ".join(f"{name} {_score(parts['all'])}" for name, parts in scores.items())


def _score(scores: Mapping[str, float]) -> str:
    return f"{scores['exact_match']:.1f} % exact, ROUGE-L {scores['rouge_l']:.1f}"


def _part_done(row: StudyRun, folder: Path) -> float:
    """The part of a run's training that is done, by its last log event, 0 to 1."""
    path = folder / TRAINING / LOG_FILE
    if not path.is_file():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if "train_runtime" in event:
            return 1.0
        if "budget_used" in event:
            return float(event["budget_used"])
        if "loss" in event:
            return float(event["step"]) / float(row.values["max_steps"])
    return 0.0
