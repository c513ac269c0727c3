"""The finished rows of a study: where they are kept, how several machines' come together, and what a CSV has of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.study.plan import StudyRun

Row = dict[str, Any]
ROWS_FILE, CSV_FILE = "rows.jsonl", "study.csv"
# In the study's folder: a folder for each run, and in that its training and, once it is done, its row.
RUNS, TRAINING, ROW_FILE = "runs", "run", "row.json"
# Of a whole run; see training/costs.py.
COSTS = (
    *("steps", "student_forwards", "teacher_forwards"),
    *("generated_tokens", "teacher_generated_tokens", "training_seconds"),
)
# Where a study asks for the distance to the teacher.
DISTANCES = ("reverse_kl", "forward_kl")
# What a CSV says of a set's part, as far as it was measured.
_SCORES = (
    *("exact_match", "rouge_l", *DISTANCES),
    *(f"{measure}_per_token" for measure in DISTANCES),
    *("response_tokens", "ended_share"),
)
_WHO = ("kind", "method", "setting", "seed", "budget")
# Where and by what a run was trained.
WHENCE = ("version", "commit", "machine", "date")


def finished_rows(folder: Path) -> dict[str, Row]:
    """All finished rows of a study's folder by identity: those of its runs, and those of its rows.jsonl, wherever they were made.

    Raises UserError for a line that is no row.
    """
    found: dict[str, Row] = {}
    path = folder / ROWS_FILE
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), start=1):
        if line.strip():
            row = _row(line, f"{path}:{number}")
            found.setdefault(row["identity"], row)
    for path in sorted((folder / RUNS).glob(f"*/{ROW_FILE}")):
        row = _row(path.read_text(encoding="utf-8"), str(path))
        found[row["identity"]] = row
    return found


def kept_models(runs: Path) -> dict[str, tuple[Path, Row]]:
    """The folders and rows of finished trainings whose models were kept, by what decided them (`StudyRun.training`).

    Raises UserError for a row.json that is none.
    """
    found = {}
    for path in sorted(runs.glob(f"*/{ROW_FILE}")):
        row = _row(path.read_text(encoding="utf-8"), str(path))
        # Rows of earlier versions say neither. A model that was to be kept may have been deleted since.
        if row.get("model_kept") and any((path.parent / TRAINING).glob("*.safetensors")):
            found[row["training"]] = path.parent / TRAINING, row
    return found


def _row(text: str, place: str) -> Row:
    try:
        row: Row = json.loads(text)
        _ = row["identity"], row["scores"], row["sets"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place} is no finished row of a study; delete it, and its run is done again") from None
    return row


def save_rows(folder: Path, rows: Mapping[str, Row], planned: Sequence[StudyRun]) -> None:
    """Write rows.jsonl with all rows, those of other studies too, and study.csv with the planned ones, in the plan's order."""
    write_atomically(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows.values()))
    write_atomically(folder / CSV_FILE, as_csv(planned_rows(rows, planned)))


def planned_rows(rows: Mapping[str, Row], planned: Sequence[StudyRun]) -> list[Row]:
    """The finished rows of the plan, in its order, named as the plan names them."""
    names = ("kind", "method", "setting", "seed")
    return [
        rows[each.identity] | {name: getattr(each, name) for name in names} for each in planned if each.identity in rows
    ]


def as_csv(rows: Iterable[Row]) -> str:
    """A line for each run: who, the scores of each set and bucket (exact match, ROUGE-L: 0 to 100), costs, and where it is from."""
    lines = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in (*WHENCE, "identity")))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *WHENCE, "identity"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {key: row[key] for key in _WHO}
    for name, parts in row["scores"].items():
        for part, scores in parts.items():
            for measure in (each for each in _SCORES if each in scores):
                flat[f"{name} {part} {measure}"] = round(scores[measure], 3)
    flat |= {key: _rounded(row["costs"].get(key, "")) for key in COSTS}
    return flat | {key: row[key] for key in (*WHENCE, "identity")}


def _rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
