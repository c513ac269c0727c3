"""Data as people have it: other column names, other files, several sources, streams, and very many rows."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from runs import switchkd, write_rows, write_run
from switchkd.data.columns import with_columns
from switchkd.data.examples import to_examples
from switchkd.data.rows import read_rows
from switchkd.data.sets import resolve
from switchkd.data.shapes import row_text
from switchkd.data.sources import Source, sources_of
from switchkd.errors import UserError
from switchkd.run.file import run_from_values
from tiny import tiny_tokenizer

LIMITS: dict[str, Any] = {"max_prompt_tokens": 20, "max_response_tokens": 8, "need_response": True}
QA = [{"question": f"one w{20 + n}", "answer": "sun", "prompt": "not this"} for n in range(4)]


def texts(rows: Any) -> list[tuple[Any, tuple[str, ...]]]:
    return [(text.prompt, text.references) for text in map(row_text, rows)]


def test_columns_are_read_under_our_names_and_win_over_other_shapes() -> None:
    chat = [{"role": "user", "content": "no"}]
    rows = read_rows([{**row, "messages": chat} for row in QA])
    mapped = with_columns(rows, {"prompt": "question", "completion": "answer"})
    assert texts(mapped) == [(row["question"], (row["answer"],)) for row in QA]
    assert texts(with_columns(rows, {"messages": "messages"}))[0][0] == chat


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"prompt": "queston"},
            "maps prompt to 'queston', but no row has this column; there are question, answer, prompt",
        ),
        ({"promt": "question"}, "maps 'promt', which rows have no use for; did you mean 'prompt'"),
        ({"prompt": "question", "messages": "answer"}, "maps prompt, messages, which no shape of rows has together"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(columns: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        with_columns(read_rows(QA), columns)


@pytest.mark.parametrize(("ending", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_cells_are_text_and_a_row_is_found_at_its_line(tmp_path: Path, ending: str, mark: str) -> None:
    path = tmp_path / f"d{ending}"
    lines = ["\ufeffprompt{}completion", '"a\nb"{}5', "", "c{}007", "d"]
    path.write_text("\n".join(lines).replace("{}", mark) + "\n", encoding="utf-8")
    rows = read_rows(path)
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 5, 6)]
    assert texts(rows[:2]) == [("a\nb", ("5",)), ("c", ("007",))]
    assert rows[-1].problem == "cells do not fit the header: 1 under 2 names"


def test_conversations_are_chats() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    (row, bad) = read_rows(
        [{"conversations": turns, "system": "s"}, {"conversations": [{"from": "bot", "value": "x"}]}]
    )
    assert row_text(row).prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert row_text(row).references == ("yes",)
    with pytest.raises(UserError, match="conversations has a message from 'bot'; known are human"):
        row_text(bad)


# ------ several sources


def ids(sources: Any, seed: int = 0) -> list[int]:
    loaded = to_examples(resolve(sources, seed=seed), tiny_tokenizer(), **LIMITS)
    return [example.prompt.prompt_id for example in loaded.examples]


def test_a_weight_is_how_often_a_row_comes_up(tmp_path: Path) -> None:
    rows = [{"prompt": f"one w{20 + n}", "completion": "sun"} for n in range(10)]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    other = str(write_rows(tmp_path / "b.jsonl", QA))
    columns = {"prompt": "question", "completion": "answer"}
    both = [{"path": path, "weight": 2.5}, {"path": other, "columns": columns}]
    found = ids(both)
    assert len(found) == len(set(found)) == 10 * 2 + 5 + 4
    assert {each % 14 for each in found} == set(range(14))
    assert found == ids(both) != ids(both, seed=1)
    assert len(ids({"path": path, "weight": 0.5})) == 5
    assert ids(json.dumps([path, path])) == list(range(20))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([], "the list of data sources is empty"),
        ({"path": "a.csv", "wieght": 2}, "no key 'wieght'; did you mean 'weight'"),
        ({"path": "a.csv", "weight": 0}, "weight of a.csv is 0.0"),
        ({"split": "test"}, "a data source has no path"),
        ({"path": "o/n:a:b", "split": "test"}, "names a split, and so does the mapping"),
        ({"path": "o/n", "shuffle_buffer": 5}, "goes with streaming: true"),
        ([{"path": "o/n", "streaming": True}, "a.csv"], "is streamed, which is for a single source"),
    ],
)
def test_a_source_that_cannot_be_is_refused(source: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sources_of(source)


def test_configurations_and_slices_in_a_name() -> None:
    assert sources_of("o/n:conf:train[:10]") == [Source("o/n", name="conf", split="train[:10]")]
    assert sources_of("o/n:train[2:10]") == [Source("o/n", split="train[2:10]")]


def test_a_stream_is_read_as_far_as_it_is_needed_and_the_same_each_time(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"w{n}", "completion": "sun"} for n in range(40)])
    stream = {"path": str(tmp_path), "streaming": True, "shuffle_buffer": 8}
    drawn = [texts(resolve(stream, stream_rows=6, seed=seed)) for seed in (3, 3, 4)]
    assert len(drawn[0]) == 6
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="nothing says how far; set max_steps"):
        resolve(stream)


def test_a_run_on_own_data_goes_from_csv_and_a_list(models: Path, tmp_path: Path) -> None:
    table = tmp_path / "qa.csv"
    table.write_text("question,answer\n" + "one two,sun\n" * 3)
    data = [{"path": str(table), "weight": 2}, {"path": str(models / "data.jsonl"), "columns": {"prompt": "prompt"}}]
    columns = {"prompt": "question", "completion": "answer"}
    run = write_run(models, tmp_path, train_data=data, columns=columns, method="sft", max_steps=1, save_strategy="no")
    assert switchkd("train", run) == 0


# ------ very many rows


def test_a_row_takes_its_tokens_and_little_else(tmp_path: Path) -> None:
    """Python's tuples took some 700 bytes a row here."""
    count = 2000
    path = write_rows(tmp_path / "many.jsonl", [{"prompt": "one two sun", "completion": "rain red"}] * count)
    tokenizer = tiny_tokenizer()
    to_examples(read_rows([QA[0] | {"completion": "x"}]), tokenizer, **LIMITS)
    tracemalloc.start()
    loaded = to_examples(read_rows(path), tokenizer, **LIMITS)
    assert len(loaded.examples) == count
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    # What is left then is the tokenizers library's own, some 190 bytes a row in its release 0.23.1.
    del loaded
    gc.collect()
    held -= tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # 6 tokens of 4 bytes, 32 for their places and 8 for two lengths; an array is at most an eighth larger than what it holds.
    assert held < 100 * count


def test_streams_of_datasets_are_not_read_as_rows() -> None:
    with pytest.raises(UserError, match="has no length"):
        read_rows(datasets.Dataset.from_list(QA).to_iterable_dataset())


def test_the_run_files_of_the_docs_are_run_files() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        run = run_from_values({"student": "a", "output_dir": "b", **yaml.safe_load(block)}, "in docs/data.md")
        assert sources_of(run.train_data)
