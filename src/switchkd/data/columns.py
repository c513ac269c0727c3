"""Columns of other names than ours: mapped as a run file says, or found by their names and what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from switchkd.data.rows import Rows, SourceRow
from switchkd.data.shapes import KNOWN_COLUMNS, READ_BY, SHAPES
from switchkd.errors import UserError, did_you_mean

# Names that data sets use, the likeliest first.
_NAMES = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "user", "article", "document", "source"),
    "completion": (
        "completion", "response", "answer", "output", "solution", "target", "reply", "assistant", "summary", "label",
    ),
    "input": ("input", "context"),
}  # fmt: skip


def with_columns(rows: Rows, columns: Mapping[str, str] | None) -> Rows:
    """The rows with columns under our names: `columns` maps each of these to the name that the source has for it.

    What is not mapped stays, but for columns of another shape: a mapped prompt is read although the row has messages too. None
    leaves the rows as they are. Raises UserError for a name that is not ours, for names that no shape has together, and where no
    row has a mapped column.
    """
    if not columns:
        return rows
    hidden = _other_shapes(columns)
    for ours, theirs in columns.items():
        if not any(theirs in row.columns for row in rows):
            # Those of the first rows stand for all.
            there = list(dict.fromkeys(chain.from_iterable(row.columns for row in islice(rows, 100))))
            raise UserError(
                f"columns maps {ours} to {theirs!r}, but no row has this column; there are {', '.join(there) or 'no columns'}"
            )

    def renamed(row: SourceRow) -> SourceRow:
        taken = {*columns.values(), *columns, *hidden}
        kept = {name: value for name, value in row.columns.items() if name not in taken}
        mapped = {ours: row.columns[theirs] for ours, theirs in columns.items() if theirs in row.columns}
        return replace(row, columns={**mapped, **kept})

    def read() -> Iterator[SourceRow]:
        return map(renamed, rows)

    return Rows(read, len(rows))


def _other_shapes(columns: Mapping[str, str]) -> set[str]:
    """The columns by which a row could be read in another shape than that of the mapped ones."""
    for name in columns:
        if name == "teacher":
            raise UserError(
                f"columns maps 'teacher' to {columns[name]!r}, but what names a row's teacher is a setting of its own; set "
                f"teacher_column: {columns[name]}"
            )
        if name not in KNOWN_COLUMNS:
            raise UserError(f"columns maps {name!r}, which rows have no use for{did_you_mean(name, KNOWN_COLUMNS)}")
    shapes = [read for read in READ_BY.values() if columns.keys() <= set(read)]
    if not shapes:
        raise UserError(
            f"columns maps {', '.join(columns)}, which no shape of rows has together; map those of one shape"
        )
    return set(KNOWN_COLUMNS).difference(*shapes)


def guessed_columns(rows: Sequence[SourceRow], origin: str) -> dict[str, str]:
    """Our names of columns, each with the source's; empty where the names are ours. Raises UserError where none fits."""
    seen: dict[str, Any] = {}
    for row in rows:
        for name, value in row.columns.items():
            seen.setdefault(name, value)
    read = next((needed for needed, _ in SHAPES if all(name in seen for name in needed)), ())
    # A prompt alone may have its answer under another name.
    if len(read) == 2 or read in (("messages",), ("conversations",)):
        return {}
    if not read and (chat := next((name for name, value in seen.items() if _is_chat(value)), None)):
        return {"messages": chat}
    prompt = read[0] if read else _named("prompt", seen)
    answer = _named("completion", {name: value for name, value in seen.items() if name != prompt})
    if prompt is None:
        raise UserError(
            f"none of the columns {', '.join(seen) or '(none)'} of {origin} looks like a prompt; write a run file with "
            f"columns: {{prompt: NAME, completion: NAME}} (docs/data.md)"
        )
    if read and answer is None:
        return {}
    if read == ("instruction",):
        found = {"instruction": prompt, "input": _named("input", seen), "output": answer}
    else:
        found = {"prompt": prompt, "completion": answer}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _named(ours: str, columns: Mapping[str, Any]) -> str | None:
    by_name = {name.lower().strip(): name for name, value in columns.items() if isinstance(value, str)}
    return next((by_name[name] for name in _NAMES[ours] if name in by_name), None)


def _is_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())
