"""What a run leaves in its folder, by name, and its log read back. Nothing heavy is imported, so a report opens at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_FILE, ENVIRONMENT_FILE, LOG_FILE, FINISHED_FILE = "run.yaml", "environment.json", "log.jsonl", "finished.json"
ROLLOUTS_FILE = "rollouts.jsonl"
# In run.yaml, between what was chosen and what is in force without having been.
DEFAULTS_MARK = "# Not set, but in force: the defaults of transformers.TrainingArguments."


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none where there is no file.

    What is no object is left out, such as a line that a crash cut off.
    """
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log events of a run, in order. Where a resumed run logged a step again, the later event stands for it."""
    events: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in read_lines(path):
        # One step may log a loss, an evaluation and the end of training: these are three events, not repeats of one.
        kind = next((key for key in ("loss", "eval_loss", "train_runtime") if key in event), "")
        key = (event.get("stage"), event.get("step"), kind)
        events.pop(key, None)
        events[key] = event
    return list(events.values())
