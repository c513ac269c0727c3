"""The rows of files, hub data sets and lists, read one at a time."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

from switchkd.errors import UserError

FILE_FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")
_ROWS_OF_PARQUET = 1000
# The module's own limit, 131,072 characters a cell, is less than some documents have.
_LONGEST_CELL = 1 << 30


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: its columns, its index there from 0, and where a person finds it.

    `problem` says why the row could not be read, in general before a colon. Its columns are then empty. `copies` is how often
    the row comes up in an epoch, and `teacher` the teacher that its source names for all its rows.
    """

    columns: Mapping[str, Any]
    index: int
    where: str
    problem: str = ""
    copies: int = 1
    teacher: str = ""


class HubOutOfReachError(UserError):
    """A data set is not here, and the hub cannot be reached."""


class Rows(Sequence[SourceRow]):
    """The rows of a source, in order. They are read again whenever they are asked for, so memory holds one at a time."""

    def __init__(self, read: Callable[[], Iterator[SourceRow]], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SourceRow]:
        return self._read()

    @overload
    def __getitem__(self, index: int) -> SourceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceRow]: ...
    def __getitem__(self, index: int | slice) -> SourceRow | list[SourceRow]:
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self._count)))
        found = range(self._count)[index]
        return next(islice(self, found, None))


def read_rows(source: str | Path | Iterable[Mapping[str, Any]], split: str = "train") -> Rows:
    """The rows of a source, in order. Only that each is an object is checked here.

    A source is a file (see `FILE_FORMATS`; a .json file holds a list), a list of dicts or a `datasets.Dataset`, or else
    the name of a data set for `datasets.load_dataset`, of which `split` is taken. A row that is not JSON or no object has
    a `problem`. The cells of .csv and .tsv are text. Raises UserError where the whole source cannot be read.
    """
    if isinstance(source, Rows):
        return source
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Sequence) and not hasattr(source, "__len__"):
            raise UserError(
                f"a {type(source).__name__} has no length, and may never end; give a list or a datasets.Dataset"
            )
        return rows_of_objects(source, "row")
    path = Path(source)
    if not is_data_file(path):
        if path.is_file():
            raise UserError(f"{path} is no file of a known format; {', '.join(FILE_FORMATS)} are read")
        return load_hub_rows(str(source), split)
    try:
        return _rows_of_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path") from None
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from error


def is_data_file(path: Path) -> bool:
    """Whether a path has the ending of a format that is read without `datasets`."""
    return path.name.endswith(FILE_FORMATS)


def load_hub_rows(
    path: str, split: str, *, name: str | None = None, data_file: str | None = None, revision: str | None = None
) -> Rows:
    """The rows of a split of a hub data set or local data set folder. Raises UserError where it cannot be loaded."""
    loaded = load_hub_set(path, name, split=split, data_files=data_file, revision=revision)
    return rows_of_objects(loaded, f"{path} {split}, row")


def load_hub_set(path: str, name: str | None, *, split: str, **options: Any) -> Any:
    """What `datasets.load_dataset` makes of a set's name and configuration. Raises UserError where it cannot be loaded."""
    # Slow to import, and most sources are files.
    import datasets

    from switchkd.models.hub import UNREACHABLE, offline_at_once

    offline = not Path(path).exists() and offline_at_once()
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return datasets.load_dataset(path, *([] if name is None else [name]), split=split, **given)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise HubOutOfReachError(f"{path!r} is no file or folder here, {UNREACHABLE}; check the name") from error
        not_a_file = f"{path!r} is not a file of a known format ({', '.join(FILE_FORMATS)})"
        which = f"its split {split!r}" + (f" of the configuration {name!r}" if name else "")
        raise UserError(
            f"{not_a_file}, and {which} cannot be loaded as a data set: {error.__cause__ or error}"
        ) from error


def rows_of_objects(objects: Any, origin: str) -> Rows:
    """The rows of objects in memory, or of a `datasets.Dataset`; a row is found at its `origin` and number."""

    def read() -> Iterator[SourceRow]:
        return (_source_row(value, index, f"{origin} {index}") for index, value in enumerate(objects))

    return Rows(read, len(objects))


def kind_of(value: Any) -> str:
    """A value that is not what it has to be, in a few words."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


# ------ files


def _rows_of_file(path: Path) -> Rows:
    """Every row is counted here, so that a file that cannot be read through is refused before anything is done with it."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            return _reread(path, _parquet_rows, file.metadata.num_rows)
    if path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(_LONGEST_CELL)
        return _reread(path, _cell_rows, sum(1 for _ in _cell_rows(path)))
    if path.suffix in (".jsonl", ".gz"):
        return _reread(path, _line_rows, sum(1 for _ in _lines(path)))
    objects = json.loads(path.read_bytes())
    if not isinstance(objects, list):
        raise ValueError(f"it holds a JSON {kind_of(objects)}, not a list of objects")
    return rows_of_objects(objects, f"{path}, row")


def _reread(path: Path, read: Callable[[Path], Iterator[SourceRow]], count: int) -> Rows:
    def read_again() -> Iterator[SourceRow]:
        try:
            yield from read(path)
        except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
            raise _unreadable(path, error) from error

    return Rows(read_again, count)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as {''.join(path.suffixes)}: {error}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield number, line


def _line_rows(path: Path) -> Iterator[SourceRow]:
    for index, (number, line) in enumerate(_lines(path)):
        where = f"{path}:{number}"
        try:
            row = _source_row(json.loads(line), index, where)
        except ValueError as error:
            row = SourceRow({}, index, where, f"not JSON: {error}")
        yield row


def _cell_rows(path: Path) -> Iterator[SourceRow]:
    # Spreadsheets put a byte-order mark before the first name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        # Strict: a quote that nothing closes would otherwise swallow the rest of the file.
        lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise ValueError(f"two columns have one name: {', '.join(header)}")
        index, begins_at = 0, lines.line_num + 1
        for cells in lines:
            where, begins_at = f"{path}:{begins_at}", lines.line_num + 1
            if not cells:
                continue
            if len(cells) == len(header):
                yield SourceRow(dict(zip(header, cells, strict=True)), index, where)
            else:
                yield SourceRow(
                    {}, index, where, f"cells do not fit the header: {len(cells)} under {len(header)} names"
                )
            index += 1


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        index = 0
        for batch in file.iter_batches(_ROWS_OF_PARQUET):
            for value in batch.to_pylist():
                yield _source_row(value, index, f"{path}, row {index}")
                index += 1


def _source_row(value: Any, index: int, where: str) -> SourceRow:
    if not isinstance(value, Mapping):
        return SourceRow({}, index, where, f"no object with columns: {kind_of(value)}")
    # Arrow gives every row every column and fills what a row lacks with None.
    return SourceRow({name: entry for name, entry in value.items() if entry is not None}, index, where)
