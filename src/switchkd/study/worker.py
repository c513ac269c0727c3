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
from typing import Any

from filelock import FileLock
from rich.console import Console

from switchkd import __version__
from switchkd.data.sets import resolve
from switchkd.errors import Stopped, UserError
from switchkd.evaluation.score import answers_file, evaluate
from switchkd.files import now, write_atomically
from switchkd.models.chat import set_template
from switchkd.models.load import load_pair, load_tokenizer
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.callbacks import read_log
from switchkd.run.file import RunConfig
from switchkd.run.folder import FINISHED_FILE, LOG_FILE, git_commit
from switchkd.run.launch import train_run
from switchkd.study.file import StudyEvaluation
from switchkd.study.plan import StudyRun
from switchkd.study.rows import COSTS, ROW_FILE, TRAINING
from switchkd.training.checkpoints import last_complete_checkpoint

ANSWERS = "answers"


def carry_out(row: StudyRun, folder: Path, *, keep_model: bool) -> None:
    """Train and evaluate one run in its folder, from where an earlier attempt ended, and write row.json last.

    Raises UserError for what does not fit, and Stopped where a signal ended the training.
    """
    with FileLock(folder / ".lock"):
        # A worker that lost its study may have been finishing this very run.
        if (folder / ROW_FILE).is_file():
            return
        run = row.run(folder / TRAINING)
        if row.kind == "run":
            _train(run, Path(run.output_dir))
        model = {"run": run.output_dir, "start": run.student, "teacher": str(run.teacher)}[row.kind]
        sets, scores = _measure(row, run, model, folder / ANSWERS)
        found = {
            **asdict(row),
            "scores": scores,
            "sets": sets,
            "costs": _costs(Path(run.output_dir)) if row.kind == "run" else {},
            "version": __version__,
            "commit": git_commit(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "date": now(),
        }
        write_atomically(folder / ROW_FILE, json.dumps(found) + "\n")
        if row.kind == "run":
            _tidy(Path(run.output_dir), keep_model=keep_model)


def _train(run: RunConfig, folder: Path) -> None:
    goes_on = (folder / FINISHED_FILE).is_file() or last_complete_checkpoint(folder) is not None
    if folder.exists() and not goes_on:
        # What an attempt has left that ended before its first checkpoint.
        shutil.rmtree(folder)
    train_run(run, Console(highlight=False, width=120), resume=goes_on)


def _measure(row: StudyRun, run: RunConfig, model: str, answers: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's results on each set: those of each row, and their means."""
    config, given = run.config(), {**row.evaluation, "seeds": tuple(row.evaluation["seeds"])}
    evaluation = StudyEvaluation(**given)
    # What a run leaves is loaded as it is.
    how: dict[str, dict[str, Any]] = {
        "start": {
            "student_drop_layers": run.student_drop_layers,
            "student_quantization": run.student_quantization,
            "model_init_kwargs": config.model_init_kwargs,
        },
        "teacher": {
            "student_quantization": run.teacher_quantization,
            "model_init_kwargs": config.teacher_model_init_kwargs,
        },
    }
    pair = load_pair(
        model,
        None,
        placement=config.placement,
        trust_remote_code=run.trust_remote_code,
        **how.get(row.kind, {}),
    )
    assert pair.tokenizer is not None
    if row.kind == "start" and run.teacher not in (None, "self"):
        teacher_tokenizer = load_tokenizer(str(run.teacher), trust_remote_code=run.trust_remote_code)
        set_template(pair.tokenizer, teacher_tokenizer, config.template_from)
    settings = evaluation.settings(config)
    pair.check_room(settings.max_prompt_tokens + settings.sampling.max_new_tokens)
    found = evaluate(
        SpeculativeEngine(pair, config.block_size, max_rows=config.rollout_rows, compile=config.compile),
        pair.tokenizer,
        {name: resolve(name, "eval", data_dir=run.data_dir, limit=evaluation.limit) for name in evaluation.sets},
        model_name=row.name,
        settings=settings,
        out_folder=answers,
    )
    scores = {}
    for name, result in found.sets.items():
        parts = {"all": result.overall, **result.by_bucket}
        scores[name] = {part: {"rows": each.rows, **asdict(each.mean)} for part, each in parts.items()}
    return {name: _by_row(answers_file(answers, name)) for name in evaluation.sets}, scores


def _by_row(path: Path) -> dict[str, Any]:
    """What an interval over rows needs: for each seed of the sampling, each row's exact match, 0 or 1, and ROUGE-L, 0 to 100.

    And each row's id, and the number of its bucket among `buckets`, where rows have one.
    """
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        by_seed.setdefault(answer["seed"], []).append(answer)
    first = next(iter(by_seed.values()))
    buckets = list(dict.fromkeys(answer["bucket"] for answer in first))
    return {
        "rows": [answer["prompt_id"] for answer in first],
        "buckets": buckets,
        "bucket_of": [buckets.index(answer["bucket"]) for answer in first],
        "exact_match": ["".join(str(int(each["exact_match"])) for each in answers) for answers in by_seed.values()],
        "rouge_l": [[round(each["rouge_l"], 2) for each in answers] for answers in by_seed.values()],
    }


def _costs(folder: Path) -> dict[str, float]:
    """What the run has spent, as its last log event says, and its steps."""
    ended = next(event for event in reversed(read_log(folder / LOG_FILE)) if "train_runtime" in event)
    return {name: ended["step" if name == "steps" else name] for name in COSTS}


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
