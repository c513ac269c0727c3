"""What is wrong with the rows of a source, said once for all rows of the same fault."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from switchkd.data.rows import SourceRow
from switchkd.data.shapes import ACCEPTED_SHAPES
from switchkd.errors import UserError

FAULTS_SHOWN = 20
_ACCEPTED = f"Accepted are {ACCEPTED_SHAPES}, or other columns that a run file names: columns: {{prompt: NAME, completion: NAME}}."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why. `kind` is the reason without what differs from row to row."""

    index: int
    where: str
    reason: str
    kind: str


@dataclass
class Faults:
    """The limits of a source of `rows` rows, which rows cannot be used, and what is ignored or cut in the others.

    `answers` counts the answers that were rendered, and `unopened` those that do not begin as they are served, by what the
    template opens an answer with.
    """

    rows: int
    max_prompt_tokens: int
    max_response_tokens: int
    bad: list[BadRow] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    unopened: Counter[str] = field(default_factory=Counter)
    _prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    _response_lengths: array[int] = field(default_factory=lambda: array("i"))

    def add(self, row: SourceRow, reason: str, kind: str) -> None:
        """Leave a row out."""
        self.bad.append(BadRow(row.index, row.where, reason, kind))

    def fits(self, row: SourceRow, prompt_tokens: int, response_tokens: int) -> bool:
        """Whether the row's prompt keeps to its limit; else the row is left out."""
        self._prompt_lengths.append(prompt_tokens)
        if prompt_tokens <= self.max_prompt_tokens:
            self._response_lengths.append(response_tokens)
            return True
        # Of several turns that are too long, the first speaks for the row.
        if not self.bad or self.bad[-1].index != row.index:
            reason = f"the prompt has {prompt_tokens:,} tokens; max_prompt_tokens is {self.max_prompt_tokens:,}"
            self.add(row, reason, f"the prompt has more than max_prompt_tokens ({self.max_prompt_tokens:,})")
        return False

    def report(self, left: int, skip_bad_rows: bool) -> None:
        """Say what is wrong. Raises UserError where no example is left, and unless `skip_bad_rows` for any bad row."""
        self.bad.sort(key=lambda row: row.index)
        if not self.rows:
            raise UserError(f"the data set has no rows; give one with rows of the shape {ACCEPTED_SHAPES}")
        limits = _kept_by_limits("max_prompt_tokens", self.max_prompt_tokens, self._prompt_lengths)
        listing = f"{len(self.bad):,} of {self.rows:,} rows cannot be used:{_grouped(self.bad)}{limits}"
        if self.bad and not skip_bad_rows:
            raise UserError(
                f"{listing}\nCorrect them, or leave them out with --skip-bad-rows (skip_bad_rows: true in a run file). {_ACCEPTED}"
            )
        if not left:
            raise UserError(f"{listing}\nNo row is left. {_ACCEPTED}")
        if self.bad:
            _log.warning(listing)
        self._warn()

    def _warn(self) -> None:
        for column, count in self.ignored.items():
            _log.warning(
                f"{count:,} of {self.rows:,} rows have a column {column!r} that is not read beside their other columns"
            )
        if self.unopened:
            _log.warning(
                f"{self.unopened.total():,} of {self.answers:,} answers do not begin as they are served: the chat template "
                f"opens an answer with {next(iter(self.unopened))!r}, and writes theirs without. They are trained as it writes "
                f"them; chat_template_kwargs, such as {{enable_thinking: false}}, may make the two agree"
            )
        limit, lengths = self.max_response_tokens, self._response_lengths
        if cut := sum(length > limit for length in lengths):
            _log.warning(
                f"{cut:,} of {len(lengths):,} responses ({cut / len(lengths):.0%}) are cut, and end without an end-of-text "
                f"token.{_kept_by_limits('max_new_tokens', limit, lengths)}"
            )


def _grouped(bad: Sequence[BadRow]) -> str:
    """A line for each kind of fault, in the order of their first rows."""
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(row.kind, []).append(row)
    lines = [
        f"\n  {len(rows):,} rows: {kind} (first: {rows[0].where})"
        if rows[1:]
        else f"\n  {rows[0].where}: {rows[0].reason}"
        for kind, rows in groups.items()
    ]
    more = f"\n  and {len(lines) - FAULTS_SHOWN} other faults" if len(lines) > FAULTS_SHOWN else ""
    return "".join(lines[:FAULTS_SHOWN]) + more


def _kept_by_limits(setting: str, limit: int, lengths: Sequence[int]) -> str:
    """A line that says how many of the lengths a limit keeps, and what larger ones would; "" where it keeps all."""
    kept = sum(length <= limit for length in lengths)
    if kept == len(lengths):
        return ""
    larger = list[tuple[int, int]]()
    while kept < len(lengths):
        # The next power of two.
        limit_there = 1 << (larger[-1][0] if larger else limit).bit_length()
        kept = sum(length <= limit_there for length in lengths)
        larger.append((limit_there, kept))
    would = ", ".join(f"{each:,} would keep {count:,}" for each, count in larger)
    return f"\n{setting} {limit:,} keeps {sum(length <= limit for length in lengths):,} of {len(lengths):,}; {would}."
