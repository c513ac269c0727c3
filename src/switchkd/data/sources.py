"""What a run file says of its data: one source or several, each a name or a mapping."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from switchkd.data.free_world import WORLDS
from switchkd.data.rows import Rows, SourceRow, is_data_file
from switchkd.errors import UserError, did_you_mean
from switchkd.settings.components import setting, settings_of
from switchkd.settings.typed import typed


@dataclass(frozen=True)
class Source:
    """Where rows come from. Raises UserError for values that do not fit together."""

    path: str = setting("", "An instruction set, world, a file, a folder, or a hub name OWNER/NAME.")
    name: str | None = setting(None, "The configuration of a hub set, as in datasets.load_dataset.")
    split: str | None = setting(None, "The split; by default train, and of an instruction set to evaluate on, eval.")
    revision: str | None = setting(None, "The revision of a hub set: a branch, a tag or a commit.")
    columns: dict[str, str] | None = setting(None, "Our names of columns, each with the source's name for it.")
    weight: float = setting(
        1.0, "How often each row comes up in an epoch; of 0.5, half of the rows, drawn by the seed."
    )
    teacher: str | None = setting(
        None, "The teacher of all its rows, one of the run's teachers; by default a column says it."
    )
    streaming: bool = setting(False, "Read a hub set only as far as max_steps needs it.")
    shuffle_buffer: int = setting(0, "Rows of a stream among which the next one is drawn; 0 keeps their order.")

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("a data source has no path; give a set's name, a file or a hub name")
        if not 0 < self.weight <= 1000:
            raise UserError(f"weight of {self.path} is {self.weight}; it has to be above 0 and at most 1000")
        if self.shuffle_buffer < 0 or (self.shuffle_buffer and not self.streaming):
            raise UserError(
                f"shuffle_buffer of {self.path} is {self.shuffle_buffer}; it has to be 0 or more, and goes with streaming: true"
            )
        if self.streaming and is_data_file(Path(self.path)):
            raise UserError(f"{self.path} is a file, which is never in memory as a whole; leave streaming out")


def sources_of(given: Any) -> list[Source]:
    """The sources that a name, a mapping or a list of these stands for; text that begins with a brace is YAML.

    Raises UserError for an unknown key, a wrong type and an empty list.
    """
    if isinstance(given, str) and given.lstrip().startswith(("{", "[")):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError:
            raise UserError(f"the data source {given!r} is not YAML; correct it") from None
    if isinstance(given, list):
        if not given:
            raise UserError("the list of data sources is empty; give one")
        sources = [source for each in given for source in sources_of(each)]
        if streamed := next((each for each in sources if each.streaming and len(sources) > 1), None):
            raise UserError(
                f"{streamed.path} is streamed, which is for a single source; leave streaming or the others out"
            )
        return sources
    if isinstance(given, Mapping):
        known, hints = settings_of(Source), get_type_hints(Source)
        for key in given:
            if key not in known:
                raise UserError(f"a data source has no key {key!r}{did_you_mean(str(key), known)}")
        return [
            _of_name(Source(**{key: typed(key, value, hints[key], "of a data source") for key, value in given.items()}))
        ]
    return [_of_name(Source(str(given)))]


def _of_name(source: Source) -> Source:
    """The source with what its path says behind colons: NAME:SPLIT, or NAME:CONFIGURATION:SPLIT."""
    # The path of a file may itself hold colons, and so may a slice of a split.
    if is_data_file(Path(source.path)):
        return source
    path, *rest = re.split(r":(?![^\[]*\])", source.path)
    if len(rest) > 2:
        raise UserError(
            f"{source.path!r} has too many colons; a data set is written NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT"
        )
    if rest and (source.split or source.name):
        raise UserError(f"{source.path!r} names a split, and so does the mapping; leave one out")
    # A world has lengths instead of configurations.
    split, name = (
        (rest if path in WORLDS else rest[::-1]) + [None] * (2 - len(rest)) if rest else (source.split, source.name)
    )
    return replace(source, path=path, split=split, name=name)


def taught_by(rows: Rows, teacher: str | None) -> Rows:
    """The rows, with the teacher that their source names for all of them."""
    if not teacher:
        return rows
    return Rows(lambda: (replace(row, teacher=teacher) for row in rows), len(rows))


def mixed(parts: Sequence[tuple[Rows | list[SourceRow], float]], seed: int) -> Rows:
    """The rows of several sources, one after the other, numbered through, each as often as its source's weight says.

    Of a weight that is not whole, the seed draws which rows come up once more. Source number and seed alone decide it.
    """
    more = [set(_drawn(len(rows), weight % 1, f"{seed} {number}")) for number, (rows, weight) in enumerate(parts)]

    def read() -> Iterator[SourceRow]:
        before = 0
        for (rows, weight), drawn in zip(parts, more, strict=True):
            for row in rows:
                yield replace(row, index=before + row.index, copies=int(weight) + (row.index in drawn))
            before += len(rows)

    return Rows(read, sum(len(rows) for rows, _ in parts))


def spread(rows: Rows, count: int) -> list[SourceRow]:
    """At most `count` of the rows, in their order, as far apart as they can be: some of each source."""
    wanted = {at * len(rows) // count for at in range(count)}
    return [row for at, row in enumerate(rows) if at in wanted]


def _drawn(rows: int, share: float, seed: str) -> list[int]:
    # Text seeds the same generator on every machine.
    return random.Random(seed).sample(range(rows), round(share * rows)) if share else []
