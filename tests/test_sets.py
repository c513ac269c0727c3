import json
import os
from pathlib import Path

import datasets
import pytest

from switchkd.data.rows import read_rows
from switchkd.data.sets import DATA_DIR_VARIABLE, SETS, load_set, load_world, resolve
from switchkd.data.shapes import row_text
from switchkd.data.world import BUCKETS, make_rows, token_count
from switchkd.errors import UserError

ROW = {"instruction": "a", "input": "", "output": ["b"]}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A folder with one row in the file of DollyEval and two in the training part, named by the variable."""
    (tmp_path / "eval_dolly.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "dev_dolly.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def hub_calls(monkeypatch):
    """What `datasets` was asked for; it answers with a row."""
    calls = []
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: calls.append((name, options)) or [ROW])
    return calls


def test_a_set_comes_from_the_folder_of_the_variable_or_of_the_call(data_dir, monkeypatch):
    assert [row.where for row in load_set("dolly")] == [f"{data_dir / 'eval_dolly.jsonl'}:1"]
    monkeypatch.delenv(DATA_DIR_VARIABLE)
    assert len(load_set("dolly", "dev", data_dir=data_dir)) == 2


def test_a_folder_without_the_file_is_an_error_not_a_download(data_dir, hub_calls):
    with pytest.raises(UserError, match=r"no file .*train_dolly\.jsonl\.gz"):
        load_set("dolly", "train", data_dir)
    assert hub_calls == []


def test_without_a_folder_a_set_comes_from_the_hub(hub_calls):
    assert [row.columns for row in load_set("dolly", "train")] == [ROW]
    assert load_set("unni")[0].where.startswith("MiniLLM/uinst")
    assert hub_calls == [
        ("MiniLLM/dolly", {"split": "train[1000:]", "data_files": "raw.jsonl"}),
        ("MiniLLM/uinst", {"split": "train[:10000]", "data_files": "11_/valid.jsonl"}),
    ]


def test_names_become_rows_in_one_place(data_dir, hub_calls, tmp_path):
    assert list(resolve("dolly:dev", data_dir=data_dir)) == list(load_set("dolly", "dev", data_dir))
    assert list(resolve("dolly", "eval", data_dir=data_dir)) == list(load_set("dolly", "eval", data_dir))
    path = data_dir / "dev_dolly.jsonl"
    assert list(resolve(path)) == list(resolve(str(path))) == list(read_rows(path))
    assert len(resolve(path, limit=1)) == len(resolve("dolly:dev", data_dir=data_dir, limit=1)) == 1
    assert hub_calls == []
    resolve("owner/name:validation")
    resolve("owner/name")
    assert [(name, options["split"]) for name, options in hub_calls] == [
        ("owner/name", "validation"),
        ("owner/name", "train"),
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("doly", "no data set 'doly'; known are dolly, selfinst, vicuna, sni, unni, world"),
        ("selfinst", "selfinst has no split 'train'; it has eval"),
        ("dolly:test", "dolly has no split 'test'; it has train, dev, eval"),
        ("dolly:dev:short", "dolly has no configurations"),
        ("owner/name:a:b:c", "too many colons"),
        ("world:dev", "the world has no split 'dev'; it has train and test"),
        ("world:test:tiny", "the world has no bucket 'tiny'; it has short, medium, long"),
        ("no/such.jsonl", "there is no file"),
    ],
)
def test_an_unknown_name_lists_the_choices(source, expected):
    with pytest.raises(UserError, match=expected):
        resolve(source)


def test_an_unknown_set_lists_the_choices():
    with pytest.raises(UserError, match="no instruction set 'alpaca'; known are dolly, selfinst, vicuna, sni, unni"):
        load_set("alpaca")


def test_the_world_by_split_and_bucket():
    # Of several sources some of each.
    of_both = [row.columns["bucket"] for row in resolve("[world:test:short, world:test:long]", limit=4)]
    assert of_both == ["short", "short", "long", "long"]
    rows = resolve("world:test:short", limit=12)
    assert [row.columns for row in rows] == make_rows("test", 12, seed=0, bucket="short")
    low, high = BUCKETS["short"]
    assert all(low <= token_count(row_text(row).references[0]) <= high for row in rows)
    assert list(resolve("world", limit=6)) == list(load_world("train", limit=6))
    assert list(resolve("world", "eval", limit=6)) == list(load_world("test", limit=6))
    assert list(resolve("world", limit=6)) != list(resolve("world", "eval", limit=6))


# ------ the real files


@pytest.fixture(scope="module")
def real_data_dir():
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, beside))
    if not (folder / "eval_dolly.jsonl").exists():
        pytest.skip(
            f"the instruction sets belong to others and are not in the repository; not in {folder} or {DATA_DIR_VARIABLE}"
        )
    return folder


# Rows and mean words of a row's references, from the manifest that comes with the files.
REAL = {
    "dolly:train": (11_419, 60.3),
    "dolly:dev": (999, 60.6),
    "dolly:eval": (500, 71.8),
    "selfinst:eval": (252, 50.1),
    "vicuna:eval": (80, 192.3),
    "sni:eval": (847, 15.2),
    "unni:eval": (63, 29.8),
}


def test_every_split_of_every_set_is_checked_below():
    assert set(REAL) == {f"{name}:{split}" for name, chosen in SETS.items() for split in chosen.parts}


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_real_sets_can_be_read(real_data_dir, name):
    texts = [row_text(row) for row in resolve(name, data_dir=real_data_dir)]
    words = [sum(len(text.split()) for text in row.references) / len(row.references) for row in texts]
    assert len(texts) == REAL[name][0]
    # The manifest rounds to one place.
    assert sum(words) / len(words) == pytest.approx(REAL[name][1], abs=0.051)
    assert all(row.prompt.endswith("\n\n### Response:\n") for row in texts)
