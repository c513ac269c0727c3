"""What is in a run's folder: whether a run may go there or go on there, and the files that say what it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from switchkd.errors import UserError
from switchkd.files import now, write_atomically
from switchkd.models.heads import base_of
from switchkd.run.file import OWN_HINTS, SWITCH_FIELDS, RunConfig, Stage
from switchkd.run.resume import check_same_run, length_of, rows_a_step, without_tokens
from switchkd.run.written import DEFAULTS_MARK
from switchkd.run.written import ENVIRONMENT_FILE as ENVIRONMENT_FILE
from switchkd.run.written import FINISHED_FILE as FINISHED_FILE
from switchkd.run.written import LOG_FILE as LOG_FILE
from switchkd.run.written import RUN_FILE as RUN_FILE
from switchkd.training.card import versions, write_card
from switchkd.training.checkpoints import last_complete_checkpoint
from switchkd.training.pushing_trainer import ADAPTER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        check_same_run(saved, run)
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


def record_run(run: RunConfig) -> None:
    """Write run.yaml, itself a run file with every value in force, and environment.json with the versions.

    Tokens are left out: the folder is shown to others. They come from the environment, or are given again.
    """
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    values = without_tokens(run.effective_settings())
    chosen = {key: values.pop(key) for key in (*OWN_HINTS, *SWITCH_FIELDS) if key in values}
    text = _as_yaml({**chosen, **{key: values.pop(key) for key in run.training if key in values}})
    if run.stages:
        text += _as_yaml({"stages": [without_tokens(stage) for stage in run.stages]})
    # Defaults may change between versions; a run that is resumed keeps those that it began with. From its own file, all are set.
    if values:
        text += f"\n{DEFAULTS_MARK}\n{_as_yaml(values)}"
    write_atomically(folder / RUN_FILE, text)
    environment = {**_environment(), "rows_a_step": rows_a_step(run)}
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


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, stage: Stage, card: str) -> list[str]:
    """Put the stage's model, with its card, into its folder and mark the stage as finished, in this order; returns the files.

    The files are staged in a folder beside them and moved in one by one: until all are written, an earlier model stays as it
    was, and nothing else in the run's folder is ever touched but an adapter's files: whoever loads a whole model would put
    those onto it. Raises UserError if they cannot be written.
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
        files = sorted(file.name for file in staged.iterdir())
        for name in files:
            (staged / name).replace(stage.model_folder / name)
        staged.rmdir()
        for name in ADAPTER_FILES if ADAPTER_FILES[0] not in files else ():
            (stage.model_folder / name).unlink(missing_ok=True)
        write_atomically(
            stage.folder / FINISHED_FILE, json.dumps({"length": length_of(stage), "finished": now()}) + "\n"
        )
        return files
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        kept = last_complete_checkpoint(stage.folder)
        raise UserError(
            f"the trained model could not be written to {stage.model_folder} ({error}); "
            f"{f'the last checkpoint is {kept}' if kept else 'there is no checkpoint'}; make room and resume"
        ) from error
