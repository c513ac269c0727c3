"""Run files and the small models that they name, and the command line called from Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from switchkd.cli.main import main
from switchkd.study.plan import StudyRun
from switchkd.study.pool import Failure
from switchkd.study.progress import StudyProgress
from switchkd.study.rows import RUNS
from switchkd.study.worker import carry_out
from tiny import tiny_pair, tiny_tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pair(folder: Path) -> None:
    """A student and a teacher in folders of these names, and 12 rows to train on in data.jsonl."""
    tokenizer = tiny_tokenizer()
    pair = tiny_pair("llama", tokenizer=tokenizer)
    assert pair.teacher is not None
    save(pair.student, tokenizer, folder / "student")
    save(pair.teacher, tokenizer, folder / "teacher")
    rows = [{"prompt": f"one two says w{30 + n}", "completion": f"sun w{30 + n} and rain"} for n in range(12)]
    write_rows(folder / "data.jsonl", rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(models: Path, tmp_path: Path, **changes: Any) -> Path:
    """A run file of four short steps in tmp_path/out; a value of None leaves its key out."""
    values = {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "train_data": str(models / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "method": "switch",
        # A threshold of one's own spares a calibration; one that is part of a policy stands there.
        **({} if "policy" in changes else {"threshold": 0.3}),
        "max_steps": 4,
        "max_new_tokens": 6,
        "max_prompt_tokens": 16,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "use_cpu": True,
        **changes,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return path


def carry_out_here(
    rows: Sequence[StudyRun], folder: Path, workers: int, progress: StudyProgress, *, keep_models: bool
) -> list[Failure]:
    """As `study.pool.run_all`, one after the other in this process."""
    for row in rows:
        place = folder / RUNS / row.folder_name
        place.mkdir(parents=True)
        progress.started(row, place)
        carry_out(row, place, keep_model=keep_models)
        progress.ended(row, None)
    return []


def switchkd(*arguments: str | Path) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    code = exit_.value.code
    return code if isinstance(code, int) else 0
