"""The tables of a report: settings, environments, evaluations, and what a study wrote."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import yaml

# A study of more lines is read elsewhere.
_MOST_ROWS = 500
_ABSENT = "–"


class Table(TypedDict):
    """A table of text. The columns in `numeric` are set to the right; the rows in `marked` differ between the runs."""

    title: str
    note: str
    columns: list[str]
    numeric: list[int]
    rows: list[list[str]]
    marked: list[int]


def values_table(title: str, values: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each key and a column for each run; where the runs differ, the row is marked."""
    keys = dict.fromkeys(key for each in values.values() for key in each)
    rows = [[key, *(_cell(each[key]) if key in each else _ABSENT for each in values.values())] for key in keys]
    marked = [number for number, (_, *cells) in enumerate(rows) if len(set(cells)) > 1]
    note = "Rows that differ between the runs are marked with ≠." if marked else ""
    return {"title": title, "note": note, "columns": ["", *values], "numeric": [], "rows": rows, "marked": marked}


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return str(
            yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        ).strip()
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_SCORES = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "response_tokens": "tokens", "ended_share": "ended"}


def evaluation_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each set, and each bucket of it, of each eval.json, by its name: means ± deviations over the seeds."""
    found = []
    for name, evaluation in evaluations.items():
        for label, summary in _summaries(evaluation):
            try:
                found.append(([name, label, str(summary["rows"])], _scores(summary)))
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
    columns = _SCORES | {key: key for _, scores in found for key in scores if key not in _SCORES}
    return {
        "title": "Evaluations",
        "note": "Means ± sample deviations over the seeds. ROUGE-L and exact match: 0 to 100. Ended: share, 0 to 1.",
        "columns": ["evaluated", "set", "rows", *columns.values()],
        "numeric": [*range(2, 3 + len(columns))],
        "rows": [[*names, *(scores.get(key, _ABSENT) for key in columns)] for names, scores in found],
        "marked": [],
    }


def _summaries(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    sets = evaluation.get("sets")
    for name, result in sets.items() if isinstance(sets, dict) else ():
        if isinstance(result, dict):
            yield name, result.get("overall", {})
            buckets = result.get("by_bucket")
            for bucket, each in buckets.items() if isinstance(buckets, dict) else ():
                yield f"{name}, {bucket}", each


def _scores(summary: Mapping[str, Any]) -> dict[str, str]:
    """The means ± deviations by name, those of one's own too. Where answers could not be scored, eval.json has null."""
    mean, deviation = _flat(summary["mean"]), _flat(summary.get("deviation") or {})
    return {
        key: _ABSENT
        if value is None
        else f"{value:.2f}" + ("" if deviation.get(key) is None else f" ± {deviation[key]:.2f}")
        for key, value in mean.items()
    }


def _flat(scores: Mapping[str, Any]) -> dict[str, Any]:
    own = scores.get("own")
    ours = {key: scores[key] for key in _SCORES if key in scores}
    return {**(own if isinstance(own, dict) else {}), **ours}


def csv_table(title: str, text: str) -> Table:
    """The table that a .csv file holds."""
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    columns, rows = (lines[0], lines[1 : _MOST_ROWS + 1]) if lines else ([], [])
    rows = [[*line, *[""] * (len(columns) - len(line))][: len(columns)] for line in rows]
    numeric = [at for at in range(len(columns)) if rows and all(_reads_as_number(row[at]) for row in rows)]
    left_out = len(lines) - 1 - len(rows)
    note = f"The first {_MOST_ROWS:,} of {len(lines) - 1:,} rows." if left_out > 0 else ""
    shown = [[_short(cell) if at in numeric else cell for at, cell in enumerate(row)] for row in rows]
    return {"title": title, "note": note, "columns": columns, "numeric": numeric, "rows": shown, "marked": []}


def _reads_as_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def _short(cell: str) -> str:
    """A number to five figures, but whole numbers as they are."""
    return cell if not cell or cell.lstrip("-").isdigit() else f"{float(cell):.5g}"
