"""The instruction sets by short name, and the one place where the name of a data set becomes its rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.data.columns import with_columns
from switchkd.data.free_world import WORLDS
from switchkd.data.rows import (
    HubOutOfReachError,
    Rows,
    SourceRow,
    is_data_file,
    load_hub_rows,
    load_hub_set,
    read_rows,
    rows_of_objects,
)
from switchkd.data.sources import Source, mixed, sources_of, spread, taught_by
from switchkd.data.world import BUCKETS, Split, make_rows
from switchkd.errors import UserError
from switchkd.models.hub import UNREACHABLE

DATA_DIR_VARIABLE = "SWITCHKD_DATA_DIR"


@dataclass(frozen=True)
class Part:
    """One split: its file in a local folder, its file on the hub, and the slice of the latter in `datasets` notation."""

    local_file: str
    hub_file: str
    hub_slice: str = "train"


@dataclass(frozen=True)
class InstructionSet:
    """One set: its hub name, where it is from and under which license, and its splits."""

    hub_name: str
    origin: str
    parts: dict[str, Part]


# Hub names and files are those that MiniLLM publishes and its scripts read.
SETS = {
    "dolly": InstructionSet(
        "MiniLLM/dolly",
        "databricks-dolly-15k (Databricks, CC BY-SA 3.0) in the split of MiniLLM",
        {
            "train": Part("train_dolly.jsonl.gz", "raw.jsonl", "train[1000:]"),
            "dev": Part("dev_dolly.jsonl", "raw.jsonl", "train[:1000]"),
            "eval": Part("eval_dolly.jsonl", "valid.jsonl"),
        },
    ),
    "selfinst": InstructionSet(
        "MiniLLM/self-inst",
        "user-oriented instructions of Self-Instruct (Apache-2.0; its authors ask not to train on it)",
        {"eval": Part("eval_selfinst.jsonl", "valid.jsonl")},
    ),
    "vicuna": InstructionSet(
        "MiniLLM/Vicuna",
        "80 questions of FastChat (Apache-2.0) with references by gpt-3.5-turbo; for evaluation only",
        {"eval": Part("eval_vicuna.jsonl", "valid.jsonl")},
    ),
    "sni": InstructionSet(
        "MiniLLM/sinst",
        "English test tasks of Super-Natural Instructions (Apache-2.0), responses of 11 tokens and more",
        {"eval": Part("eval_sni.jsonl", "11_/valid.jsonl")},
    ),
    "unni": InstructionSet(
        "MiniLLM/uinst",
        "Unnatural Instructions (MIT, text by text-davinci-002), responses of 11 tokens and more, first 10,000",
        {"eval": Part("eval_unni.jsonl", "11_/valid.jsonl", "train[:10000]")},
    ),
}

WORLD_SEED = 0
WORLD_ROWS: dict[Split, int] = {"train": 4096, "test": 192}


def load_set(name: str, split: str = "eval", data_dir: str | Path | None = None) -> Rows:
    """The rows of an instruction set, from a local folder or else from the hub through `datasets`.

    The folder is `data_dir`, or else what the variable SWITCHKD_DATA_DIR names. Raises UserError for an unknown name or
    split, and for a folder without the file.
    """
    if name not in SETS:
        raise UserError(f"there is no instruction set {name!r}; known are {', '.join(SETS)}")
    chosen = SETS[name]
    if split not in chosen.parts:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(chosen.parts)}")
    part = chosen.parts[split]
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if folder:
        return read_rows(Path(folder) / part.local_file)
    try:
        return load_hub_rows(chosen.hub_name, part.hub_slice, data_file=part.hub_file)
    except HubOutOfReachError as error:
        raise UserError(
            f"{name}: no folder is set (--data-dir or {DATA_DIR_VARIABLE}), {UNREACHABLE}; set one that holds {part.local_file}"
        ) from error


def load_world(split: str, bucket: str | None = None, limit: int | None = None, name: str = "world") -> Rows:
    """The first `limit` rows of an embedded world (by default 4,096 to train, 192 to test), always the same.

    `name` is "world", or "world-free" where prompts have more than one right answer. `split` is "train" or "test" ("eval"
    means test); `bucket` is a length, "short", "medium" or "long", or None for all in turn. Raises UserError for another split
    or bucket.
    """
    if split not in ("train", "test", "eval"):
        raise UserError(f"the world has no split {split!r}; it has train and test")
    if bucket is not None and bucket not in BUCKETS:
        raise UserError(f"the world has no bucket {bucket!r}; it has {', '.join(BUCKETS)}")
    world_split: Split = "train" if split == "train" else "test"
    count = WORLD_ROWS[world_split] if limit is None else limit
    return read_rows(make_rows(world_split, count, seed=WORLD_SEED, bucket=bucket, world=WORLDS[name]))


def resolve(
    source: Any,
    split: str = "train",
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    stream_rows: int | None = None,
) -> Sequence[SourceRow]:
    """The rows that a data source in a run file or on the command line stands for; with `limit`, the first ones.

    Of a list of sources these are as many, spread over all of it.

    `source` is a file, NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT where NAME is an instruction set, a local data set folder
    or a hub name, or WORLD, WORLD:SPLIT or WORLD:SPLIT:BUCKET where WORLD is world or world-free; a mapping with the keys of
    `Source`; or a list of these, mixed by weight and `seed`. `split` counts where the source says none. `columns` are those of
    sources that bring none, named sets aside. Of a streamed set, `limit` or else `stream_rows` rows are read. Raises UserError
    for an unknown data set.
    """
    sources = sources_of(source)
    parts: list[tuple[Rows | list[SourceRow], float]] = []
    for each in sources:
        rows = (
            _streamed(each, each.split or split, limit or stream_rows, seed)
            if each.streaming
            else _rows_of(each, split, data_dir, limit)
        )
        named = each.path in SETS or each.path in WORLDS
        rows = with_columns(rows, each.columns or (None if named else columns))
        parts.append((taught_by(rows, each.teacher), each.weight))
    if len(parts) > 1 or sources[0].weight != 1:
        rows = mixed(parts, seed)
        return rows if limit is None else spread(rows, limit)
    only = parts[0][0]
    return only if limit is None else only[:limit]


def _rows_of(source: Source, split: str, data_dir: str | Path | None, limit: int | None) -> Rows:
    name, chosen_split = source.path, source.split or split
    if name in WORLDS:
        return load_world(chosen_split, source.name, limit, name)
    if name in SETS:
        if source.name:
            raise UserError(f"{name} has no configurations; write {name} or {name}:SPLIT, and not {source.name!r}")
        return load_set(name, chosen_split, data_dir)
    # A misspelled set would otherwise be looked up on the hub, and fail there with an error about the network.
    if not is_data_file(Path(name)) and "/" not in name and not Path(name).exists():
        choices = ", ".join([*SETS, *WORLDS])
        raise UserError(f"there is no data set {name!r}; known are {choices}, or give a file or a hub name OWNER/NAME")
    if is_data_file(Path(name)) or Path(name).is_file():
        return read_rows(name)
    return load_hub_rows(name, chosen_split, name=source.name, revision=source.revision)


def _streamed(source: Source, split: str, count: int | None, seed: int) -> Rows:
    """The first rows of a hub set, or the first that the buffer draws: the same ones under the same seed."""
    if count is None:
        raise UserError(
            f"{source.path} is streamed, but nothing says how far; set max_steps, and stream training data alone"
        )
    stream = load_hub_set(source.path, source.name, split=split, streaming=True, revision=source.revision)
    if source.shuffle_buffer:
        stream = stream.shuffle(seed=seed, buffer_size=source.shuffle_buffer)
    return rows_of_objects(list(stream.take(count)), f"{source.path} {split}, streamed row")
