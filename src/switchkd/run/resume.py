"""Whether a run goes on in its folder: as the run that it was, from which checkpoint, and to how many steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from switchkd.data.sources import sources_of
from switchkd.errors import UserError
from switchkd.run.file import RunConfig, Stage, read_mapping, run_from_values
from switchkd.run.written import ENVIRONMENT_FILE, FINISHED_FILE
from switchkd.serving.teacher import is_address
from switchkd.training.card import TEACHES_NOTHING
from switchkd.training.checkpoints import STATE_FILE, check_resumable, is_complete, last_complete_checkpoint
from switchkd.training.outlook import steps_of

# What a run may change when it goes on: how long it is, what is logged, kept and evaluated, and where and how it is computed.
_CHANGEABLE = [
    "max_steps",
    "num_train_epochs",
    "max_seconds",
    "max_generated_tokens",
    "data_dir",
    "report_to",
    "run_name",
    "dataloader_num_workers",
    *TEACHES_NOTHING,
]
# Their product with the number of processes stays.
_ROWS_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
_CHANGEABLE_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "push_")
# Keywords of from_pretrained, among which there may be a token.
_LOADING = ("model_init_kwargs", "teacher_model_init_kwargs")


def without_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's or a stage's values without those that let somebody in: hub_token, and tokens among the keywords of loading."""
    kept = {key: value for key, value in values.items() if not _is_token(key)}
    for name in _LOADING:
        if isinstance(kept.get(name), Mapping):
            kept[name] = {key: value for key, value in kept[name].items() if not _is_token(key)} or None
    return kept


def _is_token(key: object) -> bool:
    return key == "token" or str(key).endswith("_token")


def rows_a_step(run: RunConfig) -> list[int]:
    """Of each stage, the rows of an optimizer step over all processes."""
    # From the values, not from a config: another of these would reset accelerate's state under a trainer.
    settings, processes = run.effective_settings(), int(os.environ.get("WORLD_SIZE", "1"))
    stages = [{**settings, **stage} for stage in run.stages or [{}]]
    return [math.prod(int(values[key]) for key in _ROWS_A_STEP) * processes for values in stages]


def check_same_run(saved: Path, run: RunConfig) -> None:
    """Raise UserError for a setting that a run must not change on its way; `saved` is its run.yaml."""
    begun = run_from_values(read_mapping(saved), f"in {saved}")
    changeable = [*_CHANGEABLE, *(_ROWS_A_STEP if _check_same_steps(saved.parent, run) else ())]
    parts = [("", begun.effective_settings(), run.effective_settings())]
    if len(begun.stages) != len(run.stages):
        raise UserError(
            f"the run in {run.output_dir} has {len(begun.stages)} stages, this run file {len(run.stages)}; resume with the "
            f"same stages, or give another output_dir"
        )
    pairs = zip(begun.stages, run.stages, strict=True)
    parts += [(f" of stage {number}", dict(old), dict(new)) for number, (old, new) in enumerate(pairs, start=1)]
    for place, *values in parts:
        # The saved ones have no tokens.
        old, new = map(without_tokens, values)
        for key in dict.fromkeys([*old, *new]):
            if key == "max_steps" and old.get(key) != new.get(key) and _streams(run.train_data):
                raise UserError(
                    f"max_steps{place} is {new.get(key)}, but was {old.get(key)}, and a stream is read as far as max_steps asks: "
                    f"other steps would get other rows; set it back to resume, or give another output_dir"
                )
            if key in changeable or key.startswith(_CHANGEABLE_PREFIXES) or _is_same(key, old.get(key), new.get(key)):
                continue
            raise UserError(
                f"{key}{place} is {new.get(key)!r}, but the run in {run.output_dir} was started with {old.get(key)!r}; set it "
                f"back to resume, or give another output_dir"
            )


def _check_same_steps(folder: Path, run: RunConfig) -> bool:
    """Whether the run is known to have the rows a step that it began with, on however many processes.

    Raises UserError where it has others: each step would get other rows.
    """
    try:
        begun = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8")).get("rows_a_step")
    except (OSError, ValueError):
        begun = None
    now_there = rows_a_step(run)
    if begun not in (None, now_there):
        raise UserError(
            f"a step of this run had {_listed(begun)} rows when it began, and has {_listed(now_there)} now "
            f"(per_device_train_batch_size x gradient_accumulation_steps x processes); set these so that there are as many, or "
            f"give another output_dir"
        )
    return begun is not None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))


def _is_same(key: str, old: Any, new: Any) -> bool:
    """Whether a setting means what it did when the run began."""
    # Left open, it follows the student, which has not changed.
    if key == "learning_rate" and new is None:
        return True
    # It was found here: its folder was moved, or is named from another working folder.
    if key == "output_dir":
        return True
    if key == "teacher":
        return old == new or _moved(old, new)
    if key == "teachers" and old and new and old.keys() == new.keys():
        return all(old[name] == new[name] or _moved(old[name], new[name]) for name in old)
    return bool(old == new)


def _moved(old: Any, new: Any) -> bool:
    """Whether both are servers' addresses that name the same of a server's models; it then only has another place."""
    return is_address(old) and is_address(new) and old.partition("#")[2] == new.partition("#")[2]


def _streams(train_data: Any) -> bool:
    return any(source.streaming for source in sources_of(train_data))


def is_finished(stage: Stage) -> bool:
    """Whether the stage was trained to its end, as long as it is now asked for, and its model is in place."""
    path = stage.folder / FINISHED_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["length"] == length_of(stage)


def length_of(stage: Stage) -> dict[str, float]:
    """What says how long a stage trains, by name of setting."""
    budget = {"max_seconds": stage.config.max_seconds, "max_generated_tokens": stage.config.max_generated_tokens}
    steps = {"max_steps": stage.config.max_steps, "num_train_epochs": stage.config.num_train_epochs}
    return steps | {key: value for key, value in budget.items() if value is not None}


def check_order(first: Stage, later: Sequence[Stage]) -> None:
    """Raise UserError where a stage after the first that is to be trained has begun already, or is finished."""
    for stage in later:
        if (stage.folder / FINISHED_FILE).is_file() or last_complete_checkpoint(stage.folder):
            raise UserError(
                f"stage {first.name} is to be trained, but {stage.name} has already begun from it; set its max_steps and "
                f"num_train_epochs back, or give another output_dir"
            )


def check_start(stage: Stage) -> None:
    """Raise UserError where the stage cannot go on: from weights alone, or after a finished model without any checkpoint."""
    checkpoint = last_complete_checkpoint(stage.folder)
    if checkpoint is not None:
        check_resumable(checkpoint)
    elif (stage.folder / FINISHED_FILE).is_file():
        raise UserError(
            f"the model in {stage.model_folder} is finished at another length, and there is no checkpoint to go on from; set the "
            f"length back, give another output_dir, or name {stage.model_folder} as student of a new run"
        )


def check_length(stage: Stage, rows: int) -> None:
    """Raise UserError where the stage was shortened, but has been trained as far already; `rows` are those of its data."""
    checkpoint = last_complete_checkpoint(stage.folder)
    if checkpoint is None:
        return
    state, steps = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")), steps_of(stage.config, rows)
    if state.get("max_steps", 0) > steps <= state.get("global_step", 0):
        raise UserError(
            f"the run would have {steps} steps now, but {checkpoint} is from a run of {state['max_steps']} and at step "
            f"{state['global_step']} already; take more steps than that, or give another output_dir"
        )


def agreed_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint as the main process finds it, the same in all processes, or None. All processes call it.

    Raises UserError in all of them where one does not have it, as on a machine with a disk of its own.
    """
    found = last_complete_checkpoint(folder)
    if PartialState().num_processes == 1:
        return found
    (name,) = broadcast_object_list([found.name if found else None])
    chosen = folder / name if name else None
    there = gather_object([chosen is None or is_complete(chosen)])
    if lacking := [str(rank) for rank, has_it in enumerate(there) if not has_it]:
        raise UserError(
            f"the main process goes on from {chosen}, which process {', '.join(lacking)} does not have or has in part; put "
            f"output_dir on a disk that all machines share, or copy the checkpoint to each"
        )
    return chosen
