"""One run of a study in a process of its own: trained, evaluated, and written down in a file that says it is done."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from switchkd import __version__
from switchkd.errors import Stopped, UserError
from switchkd.files import now, write_atomically
from switchkd.run.callbacks import read_log
from switchkd.run.file import RunConfig
from switchkd.run.folder import FINISHED_FILE, LOG_FILE, RUN_FILE, git_commit
from switchkd.run.launch import train_run
from switchkd.study.measure import measure
from switchkd.study.plan import StudyRun
from switchkd.study.rows import COSTS, ROW_FILE, TRAINING, WHENCE, kept_models
from switchkd.training.checkpoints import has_optimizer, last_complete_checkpoint

ANSWERS = "answers"


def carry_out(row: StudyRun, folder: Path, *, keep_model: bool) -> None:
    """Train and evaluate one run in its folder, from where an earlier attempt ended, and write row.json last.

    What another evaluation has trained, in a folder beside it, is measured as it is. Raises UserError for what does not fit, and
    Stopped where a signal ended the training.
    """
    with FileLock(folder / ".lock"):
        # A worker that lost its study may have been finishing this very run.
        if (folder / ROW_FILE).is_file():
            # It may have been killed before it was tidy.
            _tidy(folder / TRAINING, keep_model=keep_model)
            return
        kept, of_kept = kept_models(folder.parent).get(row.training, (None, {}))
        run = row.run(kept or folder / TRAINING)
        if row.kind == "run" and kept is None:
            _train(run, Path(run.output_dir))
        model = {"run": run.output_dir, "start": run.student, "teacher": str(run.teacher)}[row.kind]
        sets, scores = measure(row, run, model, folder / ANSWERS)
        found = {
            **asdict(row),
            "scores": scores,
            "sets": sets,
            "costs": _costs(Path(run.output_dir)) if row.kind == "run" and kept is None else {},
            "version": __version__,
            "commit": git_commit(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "date": now(),
            "model_kept": keep_model and kept is None,
            # Of the training, whoever measures it.
            **{key: of_kept[key] for key in ("costs", *WHENCE) if kept},
        }
        write_atomically(folder / ROW_FILE, json.dumps(found) + "\n")
        # An attempt of its own is of no use beside a model that is kept.
        _tidy(folder / TRAINING, keep_model=keep_model and kept is None)


def _train(run: RunConfig, folder: Path) -> None:
    # Of a run whose row was deleted, the model is gone.
    if (folder / FINISHED_FILE).is_file():
        goes_on = any(folder.glob("*.safetensors"))
    else:
        # The teacher's text is kept as it is written.
        has_text = (folder / RUN_FILE).is_file() and any(folder.glob("teacher_text*.jsonl"))
        while (checkpoint := last_complete_checkpoint(folder)) and not has_optimizer(checkpoint):
            # Of save_only_model: nothing goes on from it.
            shutil.rmtree(checkpoint)
        goes_on = has_text or checkpoint is not None
    if folder.exists() and not goes_on:
        # What an attempt has left that ended before its first checkpoint.
        shutil.rmtree(folder)
    train_run(run, Console(highlight=False, width=120), resume=goes_on)


def _costs(folder: Path) -> dict[str, float]:
    """What the run has spent, as its last log event says, and its steps."""
    ended = next(event for event in reversed(read_log(folder / LOG_FILE)) if "train_runtime" in event)
    # A training of an earlier version counted less.
    return {name: ended[key] for name in COSTS if (key := "step" if name == "steps" else name) in ended}


def _tidy(folder: Path, *, keep_model: bool) -> None:
    """Remove checkpoints, which nothing will resume, and the model, unless it is to be kept."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not keep_model:
        for path in folder.glob("*.safetensors"):
            path.unlink()


def _stop_with_parent() -> None:
    """Stop as on SIGTERM once the study's process has gone: a run that nobody waits for saves and ends."""

    def watch() -> None:
        # The study holds the other end, and never writes. Not through sys.stdin, whose lock would be held at exit.
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Carry out the run that the file named as argument describes; the last line on stderr says what went wrong."""
    path = Path(sys.argv[1])
    spec = json.loads(path.read_text(encoding="utf-8"))
    _stop_with_parent()
    try:
        carry_out(StudyRun(**spec["row"]), path.parent, keep_model=spec["keep_model"])
    except (Stopped, UserError) as message:
        # In one line: the study shows the last one.
        sys.exit(" ".join(str(message).split()))


if __name__ == "__main__":
    main()
