"""What is in a run's folder: whether a run may go there or go on there, and the files that say what it was."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from switchkd.data.sources import sources_of
from switchkd.errors import UserError
from switchkd.files import now, write_atomically
from switchkd.models.heads import base_of
from switchkd.run.file import OWN_HINTS, SWITCH_FIELDS, RunConfig, Stage, read_mapping, run_from_values
from switchkd.run.written import DEFAULTS_MARK
from switchkd.run.written import ENVIRONMENT_FILE as ENVIRONMENT_FILE
from switchkd.run.written import FINISHED_FILE as FINISHED_FILE
from switchkd.run.written import LOG_FILE as LOG_FILE
from switchkd.run.written import RUN_FILE as RUN_FILE
from switchkd.training.card import versions, write_card
from switchkd.training.checkpoints import last_complete_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a run may change when it goes on: how long it is, what is logged, kept and evaluated, and where things are.
_CHANGEABLE = [
    "max_steps",
    "num_train_epochs",
    "max_seconds",
    "max_generated_tokens",
    "rollout_rows",
    "show_rollouts_every",
    "measure_every",
    "teacher_text",
    "data_dir",
    "report_to",
    "run_name",
    "dataloader_num_workers",
]
# Their product with the number of processes stays.
_ROWS_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
_CHANGEABLE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_")


def check_output_dir(run: RunConfig, resume: bool) -> None:
    """Raise UserError unless the run's folder is free, or, with `resume`, holds this run."""
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; give a folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(
            f"output_dir is {str(folder)!r}, but nothing can be written to {there}; give another output_dir"
        )
    saved = folder / RUN_FILE
    if resume:
        if not saved.is_file():
            raise UserError(f"there is no run in {folder} to resume (no {RUN_FILE}); leave --resume out")
        begun = run_from_values(read_mapping(saved), f"in {saved}")
        _check_same_run(begun, run, _check_same_steps(folder, run))
        return
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if saved.is_file():
        raise UserError(
            f"output_dir {folder} holds another run ({_state_of(folder)}); continue it with --resume, give another "
            f"output_dir, or delete the folder yourself"
        )
    if present:
        raise UserError(
            f"output_dir {folder} is not empty ({', '.join(present[:3])}{', ...' if len(present) > 3 else ''}) and holds "
            f"no run; give another output_dir"
        )


def _state_of(folder: Path) -> str:
    finished = sorted(folder.glob(f"**/{FINISHED_FILE}"))
    if folder / FINISHED_FILE in finished:
        return "finished"
    checkpoints = [last_complete_checkpoint(place) for place in (folder, *folder.iterdir()) if place.is_dir()]
    kept = next((checkpoint.relative_to(folder) for checkpoint in checkpoints if checkpoint), None)
    return f"unfinished, last checkpoint {kept}" if kept else "unfinished, without a checkpoint"


def _rows_a_step(run: RunConfig) -> list[int]:
    """Of each stage, the rows of an optimizer step over all processes."""
    # From the values, not from a config: another of these would reset accelerate's state under a trainer.
    settings, processes = run.effective_settings(), int(os.environ.get("WORLD_SIZE", "1"))
    stages = [{**settings, **stage} for stage in run.stages or [{}]]
    return [math.prod(int(values[key]) for key in _ROWS_A_STEP) * processes for values in stages]


def _check_same_steps(folder: Path, run: RunConfig) -> bool:
    """Whether the run is known to have the rows a step that it began with, on however many processes.

    Raises UserError where it has others: each step would get other rows.
    """
    try:
        begun = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8")).get("rows_a_step")
    except (OSError, ValueError):
        begun = None
    now_there = _rows_a_step(run)
    if begun not in (None, now_there):
        raise UserError(
            f"a step of this run had {_listed(begun)} rows when it began, and has {_listed(now_there)} now "
            f"(per_device_train_batch_size x gradient_accumulation_steps x processes); set these so that there are as many, or "
            f"give another output_dir"
        )
    return begun is not None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))


def _check_same_run(saved: RunConfig, run: RunConfig, same_rows: bool) -> None:
    """Raise UserError for a setting that a run must not change on its way; `same_rows` as `_check_same_steps` found."""
    changeable = [*_CHANGEABLE, *(_ROWS_A_STEP if same_rows else ())]
    parts = [("", saved.effective_settings(), run.effective_settings())]
    if len(saved.stages) != len(run.stages):
        raise UserError(
            f"the run in {run.output_dir} has {len(saved.stages)} stages, this run file {len(run.stages)}; resume with the "
            f"same stages, or give another output_dir"
        )
    pairs = zip(saved.stages, run.stages, strict=True)
    parts += [(f" of stage {number}", dict(old), dict(new)) for number, (old, new) in enumerate(pairs, start=1)]
    for place, old, new in parts:
        for key in dict.fromkeys([*old, *new]):
            if key == "max_steps" and old.get(key) != new.get(key) and _streams(run.train_data):
                raise UserError(
                    f"max_steps{place} is {new.get(key)}, but was {old.get(key)}, and a stream is read as far as max_steps asks: "
                    f"other steps would get other rows; set it back to resume, or give another output_dir"
                )
            if key in changeable or key.startswith(_CHANGEABLE_PREFIXES) or old.get(key) == new.get(key):
                continue
            # Left open, it follows the student, which has not changed.
            if key == "learning_rate" and new.get(key) is None:
                continue
            # It was found here: its folder was moved, or is named from another working folder.
            if key == "output_dir":
                continue
            raise UserError(
                f"{key}{place} is {new.get(key)!r}, but the run in {run.output_dir} was started with {old.get(key)!r}; set it "
                f"back to resume, or give another output_dir"
            )


def _streams(train_data: Any) -> bool:
    return any(source.streaming for source in sources_of(train_data))


def record_run(run: RunConfig) -> None:
    """Write run.yaml, itself a run file with every value in force, and environment.json with the versions."""
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    values = run.effective_settings()
    chosen = {key: values.pop(key) for key in (*OWN_HINTS, *SWITCH_FIELDS) if key in values}
    text = _as_yaml({**chosen, **{key: values.pop(key) for key in run.training if key in values}})
    if run.stages:
        text += _as_yaml({"stages": [dict(stage) for stage in run.stages]})
    # Defaults may change between versions; a run that is resumed keeps those that it began with. From its own file, all are set.
    if values:
        text += f"\n{DEFAULTS_MARK}\n{_as_yaml(values)}"
    write_atomically(folder / RUN_FILE, text)
    environment = {**_environment(), "rows_a_step": _rows_a_step(run)}
    write_atomically(folder / ENVIRONMENT_FILE, json.dumps(environment, indent=2) + "\n")


def _as_yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _environment() -> dict[str, Any]:
    return {
        **versions(),
        "python": sys.version.split()[0],
        "git_commit": git_commit(),
        "started": now(),
    }


def git_commit() -> str | None:
    """The last commit that touched this package, where it runs from a checkout; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "log", "-1", "--format=%H", "--", "."]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def is_finished(stage: Stage) -> bool:
    """Whether the stage was trained to its end, as long as it is now asked for, and its model is in place."""
    path = stage.folder / FINISHED_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["length"] == _length(stage)


def _length(stage: Stage) -> dict[str, float]:
    budget = {"max_seconds": stage.config.max_seconds, "max_generated_tokens": stage.config.max_generated_tokens}
    steps = {"max_steps": stage.config.max_steps, "num_train_epochs": stage.config.num_train_epochs}
    return steps | {key: value for key, value in budget.items() if value is not None}


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, stage: Stage, card: str) -> None:
    """Put the stage's model, with its card, into its folder and mark the stage as finished, in this order.

    The files are staged in a folder beside them and moved in one by one: until all are written, an earlier model stays as it
    was, and nothing else in the run's folder is ever touched. Raises UserError if they cannot be written.
    """
    staged = stage.model_folder / "model.partial"
    try:
        # Of a run that was killed while saving: its files may be cut off.
        shutil.rmtree(staged, ignore_errors=True)
        model.save_pretrained(staged)
        # An adapter leaves it to its base model.
        if (generation_config := base_of(model).generation_config) is not None:
            generation_config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        # Over that of an adapter, which peft writes.
        write_card(staged, card)
        for file in staged.iterdir():
            file.replace(stage.model_folder / file.name)
        staged.rmdir()
        write_atomically(stage.folder / FINISHED_FILE, json.dumps({"length": _length(stage), "finished": now()}) + "\n")
    except (OSError, RuntimeError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        kept = last_complete_checkpoint(stage.folder)
        raise UserError(
            f"the trained model could not be written to {stage.model_folder} ({error}); "
            f"{f'the last checkpoint is {kept}' if kept else 'there is no checkpoint'}; make room and resume"
        ) from error
