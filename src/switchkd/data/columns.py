"""Columns of other names than ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice

from switchkd.data.rows import Rows, SourceRow
from switchkd.data.shapes import KNOWN_COLUMNS, READ_BY
from switchkd.errors import UserError, did_you_mean


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
        if name not in KNOWN_COLUMNS:
            raise UserError(f"columns maps {name!r}, which rows have no use for{did_you_mean(name, KNOWN_COLUMNS)}")
    shapes = [read for read in READ_BY.values() if columns.keys() <= set(read)]
    if not shapes:
        raise UserError(
            f"columns maps {', '.join(columns)}, which no shape of rows has together; map those of one shape"
        )
    return set(KNOWN_COLUMNS).difference(*shapes)
