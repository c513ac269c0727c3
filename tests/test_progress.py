"""The progress bar: where it is shown, and what it counts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from switchkd.progress import progress_bar
from switchkd.study.plan import StudyRun
from switchkd.study.progress import StudyProgress


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shown", [True, False, None])
def test_it_is_shown_on_a_terminal_unless_told_otherwise(terminal: bool, shown: bool | None) -> None:
    # 80 columns: neither the count nor the times may be cut off.
    output = io.StringIO()
    with progress_bar(Console(file=output, force_terminal=terminal, width=80), shown) as progress:
        progress.update(progress.add_task("the teacher writes", total=10_000), completed=1234)
        progress.note = "loss 0.5"
    if terminal if shown is None else shown:
        for part in ("the teacher writes", "1234/10000", "0:00:00", "left", "-:--:--", "loss 0.5"):
            assert part in output.getvalue()
    else:
        assert not output.getvalue().strip()


def test_a_part_is_counted_from_where_the_task_stands() -> None:
    with progress_bar(shown=False) as progress:
        task = progress.add_task("answers", total=6)
        for sizes in ((1, 2), (1, 3, 4)):
            count = progress.counter(task)
            for finished in sizes:
                count(finished)
    assert progress.tasks[task].completed == 6


def test_a_study_counts_on_each_method_to_take_as_long_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("switchkd.study.progress.time.perf_counter", lambda: now[0])
    (tmp_path / "row.json").write_text(
        json.dumps({"scores": {"dolly": {"all": {"exact_match": 0.0, "rouge_l": 12.34}}}})
    )
    runs = [
        StudyRun("run", method, size, seed, "", {"max_steps": 4}, {}, f"{method}{size}{seed}")
        for seed in (1, 2)
        for method, size in (("sft", "small"), ("sft", "large"))
    ]
    said = io.StringIO()
    with StudyProgress(Console(file=said, width=200), len(runs), runs, workers=1) as progress:
        assert progress.left() is None
        for run, seconds in zip(runs[:3], (10, 100, 10), strict=True):
            progress.started(run, tmp_path)
            now[0] += seconds
            progress.ended(run, None)
        # The mean of all would say 40.
        assert progress.left() == pytest.approx(100)
        told_now = "3 of 4  sft, small, seed 2: dolly 0.0 % exact, ROUGE-L 12.3 (10 s); about 1 min 40 s left"
        assert told_now in said.getvalue()
        now[0] += 700
        progress.look()
        # Nothing is at work.
        assert "at work" not in said.getvalue()
        progress.started(runs[3], tmp_path)
        for more, told in ((2, 1), (300, 1), (301, 2)):
            now[0] += more
            progress.look()
            assert said.getvalue().count("at work: sft, large, seed 2 0%; about 1 min 40 s left") == told
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
        assert progress.left() == pytest.approx(75)


def test_a_run_that_went_on_from_an_earlier_attempt_says_nothing_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("switchkd.study.progress.time.perf_counter", lambda: now[0])
    (tmp_path / "row.json").write_text(json.dumps({"scores": {}}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"loss": 1.0, "step": 3}\n')
    runs = [StudyRun("run", "sft", "", seed, "", {"max_steps": 4}, {}, f"sft{seed}") for seed in (1, 2)]
    with StudyProgress(Console(file=io.StringIO()), len(runs), runs, workers=1) as progress:
        progress.started(runs[0], tmp_path)
        now[0] += 10
        # Nothing has been done since.
        assert progress.left() is None
        (tmp_path / "run" / "log.jsonl").write_text('{"loss": 1.0, "step": 4}\n')
        # A quarter took ten seconds, and the second run is whole.
        assert progress.left() == pytest.approx(40)
        progress.ended(runs[0], None)
        assert progress.left() is None
