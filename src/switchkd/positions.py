"""Means by position in the response, over rows of different lengths, and the buckets that they are shown in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Upper ends of the buckets, in tokens from the start of the response.
BUCKET_ENDS = (32, 64, 128, 256)
_STARTS = (0, *BUCKET_ENDS)
BUCKET_NAMES = (
    *(f"{start}-{end - 1}" for start, end in zip(_STARTS, BUCKET_ENDS, strict=False)),
    f"{BUCKET_ENDS[-1]}+",
)


@dataclass(frozen=True)
class Bucket:
    """The mean over all `tokens` in a bucket of positions; `rows`: how many reach its first and its last position."""

    name: str
    mean: float
    tokens: int
    rows: tuple[int, int]


@dataclass(frozen=True)
class ByPosition:
    """The mean of a measure at each position from 0, and the number of rows that it is taken over.

    The mean at a late position is over the rows that are that long, and these may be texts of another kind than those that
    ended early. Look at `rows` before comparing positions or curves.
    """

    mean: tuple[float, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> ByPosition:
        """The means over `rows`, one sequence of values a row, the first at position 0."""
        longest = max(map(len, rows), default=0)
        # fsum, so that a mean does not depend on the order of the rows.
        columns = [[row[position] for row in rows if position < len(row)] for position in range(longest)]
        return cls(tuple(math.fsum(column) / len(column) for column in columns), tuple(map(len, columns)))

    def buckets(self) -> list[Bucket]:
        """The buckets that at least one row reaches."""
        ends = (*BUCKET_ENDS, max(len(self.rows), _STARTS[-1]))
        found = []
        for name, start, end in zip(BUCKET_NAMES, _STARTS, ends, strict=True):
            if rows := self.rows[start:end]:
                total = math.fsum(mean * count for mean, count in zip(self.mean[start:end], rows, strict=True))
                found.append(Bucket(name, total / sum(rows), sum(rows), (rows[0], rows[-1])))
        return found
