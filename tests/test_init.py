"""`switchkd init`, and that `switchkd train` takes what it wrote, for the kinds of data that people bring."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from runs import save, save_pair, switchkd, write_rows
from switchkd.data.columns import guessed_columns
from switchkd.data.rows import read_rows
from switchkd.errors import UserError
from switchkd.models.placement import Placement
from switchkd.run import draft
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without a chat template, and a teacher that brings one."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    save(tiny_model("llama", seed=1), tiny_tokenizer(chat_template=CHAT_TEMPLATE), folder / "teacher")
    return folder


def _prompts(folder: Path) -> Path:
    return write_rows(
        folder / "own.jsonl", [{"prompt": f"one w{30 + n}", "completion": "sun and rain"} for n in range(4)]
    )


def _chats(folder: Path) -> Path:
    asked = [("user", "one two"), ("assistant", "sun and rain")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in asked]} for _ in range(4)]
    return write_rows(folder / "chats.jsonl", rows)


def _cells(folder: Path) -> Path:
    path = folder / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "Question", "Answer"), *[(n, f"one w{30 + n}", "sun, rain") for n in range(4)]]
        )
    return path


def _sharegpt(folder: Path) -> Path:
    said = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "sun and rain"}]
    path = folder / "shared.json"
    path.write_text(json.dumps([{"conversations": said}] * 4))
    return path


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (_prompts, {}),
        (_chats, {"template_from": "teacher"}),
        (_cells, {"columns": {"prompt": "Question", "completion": "Answer"}}),
        (_sharegpt, {"template_from": "teacher"}),
    ],
)
def test_what_init_writes_trains_as_it_is(
    written: Any, expected: dict[str, Any], pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = written(tmp_path)
    assert switchkd("init", pair / "student", pair / "teacher", data, "-o", "first.yaml", "--device", "cpu") == 0
    values = yaml.safe_load(Path("first.yaml").read_text())
    assert {key: values.get(key) for key in ("columns", "template_from") if key in values} == expected
    assert values["max_prompt_tokens"] == 32
    # The first finds its own threshold; one calibration is enough.
    spared = () if written is _prompts else ("--set", "threshold=0.3")
    assert switchkd("train", "first.yaml", "--device", "cpu", *spared) == 0
    assert (tmp_path / "runs/first/model.safetensors").is_file()


def test_a_file_that_is_there_stays(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run.yaml"
    output.write_text("mine")
    call = ("init", pair / "student", pair / "teacher", _prompts(tmp_path), "-o", output)
    assert switchkd(*call) == 2
    assert "is there already" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert switchkd(*call, "--force") == 0
    assert output.read_text() != "mine"


def test_another_vocabulary_is_refused_before_a_file_is_written(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = save(tiny_model("llama"), tiny_tokenizer(("moon", "star")), tmp_path / "stranger")
    output = tmp_path / "run.yaml"
    assert switchkd("init", pair / "student", stranger, _prompts(tmp_path), "-o", output) == 2
    assert "tokenizers of student and teacher differ" in capsys.readouterr().err
    assert not output.exists()


def test_values_follow_the_free_memory(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Placement(torch.device("cpu"), torch.float32, torch.float32, None, None)
    names = str(pair / "student"), str(pair / "teacher"), str(_prompts(tmp_path))
    monkeypatch.setattr(draft, "free_bytes", lambda device: 80e9)
    roomy = yaml.safe_load(draft.draft_run(*names, place))
    # Room for the weights of both, but not for gradients and AdamW of the whole student.
    size = draft.size_of(names[0])
    monkeypatch.setattr(draft, "free_bytes", lambda device: 8 * size.parameters)
    tight = yaml.safe_load(draft.draft_run(*names, place))
    assert (roomy["rollout_rows"], "peft" in roomy) == (64, False)
    assert tight["rollout_rows"] < 64
    assert tight["per_device_train_batch_size"] < roomy["per_device_train_batch_size"]
    assert (tight["peft"]["r"], tight["learning_rate"]) == (16, 2e-4)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [], "question": "a"}, {}),
        ({"prompt": "a", "response": "b"}, {"prompt": "prompt", "completion": "response"}),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"instruction": "instruction", "output": "response", "input": "context"},
        ),
        ({"dialog": [{"role": "user", "content": "a"}]}, {"messages": "dialog"}),
        ({"prompt": "a"}, {}),
        # What is ours by name goes before what is likely.
        ({"instruction": "a", "question": "b", "answer": "c"}, {"instruction": "instruction", "output": "answer"}),
    ],
)
def test_columns_are_found_by_name_or_by_what_they_hold(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert guessed_columns(read_rows([row])[:1], "data") == columns


def test_a_source_without_a_prompt_is_refused_with_its_columns() -> None:
    with pytest.raises(UserError, match=r"none of the columns left, right of data looks like a prompt"):
        guessed_columns(read_rows([{"left": "a", "right": "b"}])[:1], "data")
