"""Checkpoints of a run: which are complete, and what is left behind when one cannot be written.

Imports neither torch nor transformers, so that whoever only looks at a run's folder starts fast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from switchkd.errors import UserError

# As transformers names them. The state is written last: without it, the writing was cut off.
FOLDER_PREFIX = "checkpoint"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most steps in a run's folder that was written to its end, or None."""
    found = [path for path in Path(folder).glob(f"{FOLDER_PREFIX}-*") if is_complete(path)]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds what the optimizer and its schedule were at, beside the weights."""
    # DeepSpeed keeps both in a folder of its own.
    if any(checkpoint.glob("global_step*")):
        return True
    return (checkpoint / OPTIMIZER_FILE).is_file() and (checkpoint / SCHEDULER_FILE).is_file()


def check_resumable(checkpoint: Path) -> None:
    """Raise UserError for a checkpoint of weights alone: transformers would begin a new optimizer and schedule, and not say so."""
    if not has_optimizer(checkpoint):
        raise UserError(
            f"{checkpoint} holds no optimizer and scheduler state (save_only_model writes none), so a run cannot go on from it; "
            f"name it as student of a new run, or resume from another checkpoint"
        )


def checkpoint_to_resume(named: str | None, folder: str | Path) -> Path:
    """The named checkpoint, or else the last complete one in `folder`.

    Raises UserError where it is not complete, since transformers would load its weights and start again at step 0; and where
    weights are all that it holds.
    """
    found = Path(named) if named else last_complete_checkpoint(folder)
    if found is None or not is_complete(found):
        place = found or folder
        raise UserError(f"there is no complete checkpoint in {place}; name another, or train without resuming")
    check_resumable(found)
    return found


@contextmanager
def writing_checkpoint(checkpoint: Path, *, is_main: bool) -> Iterator[None]:
    """Write a checkpoint inside the block; where that fails, the main process removes it, and UserError names the last good one.

    An error that comes after the checkpoint is complete, such as a failed push to the hub, passes through.
    """
    if is_main:
        # An earlier run's state would vouch for files that are about to be overwritten.
        (checkpoint / STATE_FILE).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # What Python, torch and safetensors make of a full disk.
        if is_complete(checkpoint):
            raise
        if is_main:
            shutil.rmtree(checkpoint, ignore_errors=True)
        kept = last_complete_checkpoint(checkpoint.parent)
        keeps = f"the last good one is {kept}" if kept else "there is no earlier one"
        raise UserError(
            f"the checkpoint {checkpoint} could not be written ({error}); {keeps}; make room and resume"
        ) from error
