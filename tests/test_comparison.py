"""Several models on the same rows: paired differences, and the command that makes the table."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from runs import switchkd, write_run
from switchkd.errors import UserError
from switchkd.evaluation.answers import ScoredAnswer
from switchkd.evaluation.comparison import Comparison, compare_answers
from switchkd.records import FinishReason


def answer(row: int, score: float, seed: int = 10, bucket: str | None = None) -> ScoredAnswer:
    return ScoredAnswer(
        f"row {row}", row, seed, bucket, "Say.", "x", (f"reference {row}",), score, score == 100, 3, FinishReason.LENGTH
    )


def difference(comparison: Comparison, model: str, bucket: str = "all") -> object:
    (line,) = [line for line in comparison.sets["x"][bucket] if line.model == model]
    return line.differences


def test_what_rows_share_cancels() -> None:
    # Rows from hopeless to easy: unpaired, a difference of one point would drown.
    base = [answer(row, float(row)) for row in range(90)]
    better = [replace(each, rouge_l=each.rouge_l + 1) for each in base]
    comparison = compare_answers({"start": {"x": base}, "run": {"x": better}})
    assert comparison.baseline == "start"
    assert difference(comparison, "start") is None
    rouge = comparison.sets["x"]["all"][1].differences["rouge_l"]  # type: ignore[index]
    # Weights of 1/90 are rounded.
    assert (rouge.mean, rouge.low, rouge.high) == pytest.approx((1, 1, 1), rel=1e-9)
    turned = compare_answers({"start": {"x": base}, "run": {"x": better}}, "run")
    assert turned.sets["x"]["all"][0].differences["rouge_l"].mean == pytest.approx(-1)  # type: ignore[index]


def test_the_interval_is_of_rows_whose_seeds_were_averaged() -> None:
    # Over the seeds of each row the difference is 0, however far apart its draws are.
    base = [answer(row, 50.0, seed) for seed in (1, 2) for row in range(20)]
    noisy = [replace(each, rouge_l=50.0 + (40 if each.seed == 1 else -40)) for each in base]
    rouge = compare_answers({"a": {"x": base}, "b": {"x": noisy}}).sets["x"]["all"][1].differences["rouge_l"]  # type: ignore[index]
    assert (rouge.mean, rouge.low, rouge.high) == (0, 0, 0)


def test_buckets_and_rows_that_one_model_could_not_answer() -> None:
    base = [answer(row, 100.0, bucket="short" if row < 4 else "long") for row in range(6)]
    other = [replace(each, exact_match=each.prompt_id == 1) for each in base[1:]]
    comparison = compare_answers({"a": {"x": base}, "b": {"x": other}})
    assert comparison.left_out == {"x": 1}
    assert {name: lines[0].rows for name, lines in comparison.sets["x"].items()} == {"all": 5, "short": 3, "long": 2}
    exact = comparison.sets["x"]["short"][1].differences["exact_match"]  # type: ignore[index]
    assert exact.mean == pytest.approx(-200 / 3)
    assert exact.low < exact.mean < exact.high
    console = Console(width=110)
    with console.capture() as captured:
        console.print(comparison.table())
    assert "x: 1 row(s) are left out" in captured.get()
    assert "-66.67 [-100.00, +0.00]" in captured.get()


def test_a_comparison_is_json_whatever_is_in_it(tmp_path: Path) -> None:
    # An interval over one row has no bounds; and an earlier evaluation may have kept a bucket of this name.
    base = [answer(row, 100.0, bucket=("all", "short")[row]) for row in range(2)]
    comparison = compare_answers({"a": {"x": base}, "b": {"x": base}})
    assert {name: lines[0].rows for name, lines in comparison.sets["x"].items()} == {"all": 2, "short": 1}
    saved = json.loads(comparison.save(tmp_path).read_text(), parse_constant=pytest.fail)
    assert saved["sets"]["x"]["short"][1]["differences"]["rouge_l"]["low"] is None


def test_what_cannot_be_compared_is_refused() -> None:
    base, others = [answer(0, 1.0)], [answer(0, 1.0, seed=11)]
    with pytest.raises(UserError, match="no row and seed in common"):
        compare_answers({"a": {"x": base}, "b": {"x": others}})
    with pytest.raises(UserError, match="row 0 is not the same for all models"):
        compare_answers({"a": {"x": base}, "b": {"x": [replace(base[0], references=("other",))]}})
    alone = replace(base[0], references=(), where="a/poems.jsonl:1")
    compare_answers({"a": {"x": [alone]}, "b": {"x": [replace(alone, where="b/poems.jsonl:1")]}})
    with pytest.raises(UserError, match="is not the same for all models"):
        compare_answers({"a": {"x": [alone]}, "b": {"x": [replace(alone, where="b/sums.jsonl:1")]}})
    with pytest.raises(UserError, match="baseline 'start' is not among"):
        compare_answers({"a": {"x": base}}, "start")


def test_a_run_stands_between_its_start_and_its_teacher(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert switchkd("train", write_run(models, tmp_path), "--set", "max_steps=1") == 0
    run = tmp_path / "out"
    card = (run / "README.md").read_text()
    assert "Not evaluated yet" in card
    assert str(tmp_path) not in card
    assert "| base model | `student` |" in card
    assert "| teacher | `teacher` |" in card
    assert "1 steps of 2 sequences" in card
    capsys.readouterr()
    small = ("--sets", models / "data.jsonl", "--limit", "3", "--seeds", "1", "--max-new-tokens", "4")
    assert switchkd("eval", run, "--with-start", "--with-teacher", *small) == 0
    shown = capsys.readouterr().out
    assert "baseline: start" in shown
    saved = json.loads((run / "eval" / "comparison.json").read_text())
    (lines,) = [buckets["all"] for buckets in saved["sets"].values()]
    assert [line["model"] for line in lines] == ["start", str(run), "teacher"]
    assert [line["differences"] is None for line in lines] == [True, False, False]
    # The start's answers are those that it gives alone.
    assert switchkd("eval", models / "student", *small, "--output", tmp_path / "alone") == 0
    (kept,) = (run / "eval" / "start").glob("answers_*.jsonl")
    assert kept.read_text() == (tmp_path / "alone" / kept.name).read_text()
    assert "| `data.jsonl` | 3 |" in (run / "README.md").read_text()


def test_names_are_checked_before_the_first_model_answers(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = models / "student"
    sets = ("--sets", models / "data.jsonl")
    for more, said in (
        (("--with-start",), "and "),
        (("--baseline", "start"), "--baseline is 'start'; it has to be one of"),
        ((models / "nothing",), "there is no such folder"),
    ):
        assert switchkd("eval", student, *more, *sets) == 2
        assert said in capsys.readouterr().err
    assert not (student / "eval").exists()


def test_an_evaluation_is_added_to_an_equal_one_and_never_put_over_another(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, folder = tmp_path / "more.jsonl", tmp_path / "eval"
    more.write_text((models / "data.jsonl").read_text())
    call = ("eval", models / "student", "--output", folder, "--seeds", "1", "--max-new-tokens", "4")
    assert switchkd(*call, "--sets", models / "data.jsonl", "--limit", "2") == 0
    first = json.loads((folder / "eval.json").read_text())
    assert switchkd(*call, "--sets", more, "--limit", "2") == 0
    both = json.loads((folder / "eval.json").read_text())
    assert [*both["sets"]] == [str(models / "data.jsonl"), str(more)]
    assert both["sets"].items() >= first["sets"].items()
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    for other, said in (
        (("--limit", "3"), "limit was 2 and is 3 now"),
        (("--limit", "2", "--temperature", "0.5"), "temperature was 1.0 and is 0.5 now"),
        (("--limit", "2", "--seeds", "1,2"), "seeds was [1] and is [1, 2] now"),
        (("--limit", "2", "--add-bos", "never"), "add_bos was auto and is never now"),
    ):
        assert switchkd(*call, "--sets", more, *other) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert said in err
        assert "give another --output, or --force to replace" in err
    teacher = ("eval", models / "teacher", *call[2:])
    assert switchkd(*teacher, "--sets", more, "--limit", "2") == 2
    assert "model was" in capsys.readouterr().err
    trained = models / "student" / "model.safetensors"
    written = trained.stat().st_mtime
    os.utime(trained, (written, time.time() + 60))
    assert switchkd(*call, "--sets", more, "--limit", "2") == 2
    assert "the model was written after it" in " ".join(capsys.readouterr().err.split())
    os.utime(trained, (written, written))
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    assert switchkd(*call, "--sets", more, "--limit", "3", "--force") == 0
    forced = json.loads((folder / "eval.json").read_text())
    assert (forced["limit"], [*forced["sets"]]) == (3, [str(more)])
