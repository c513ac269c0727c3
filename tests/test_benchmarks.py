"""The benchmarks run, and write their section without touching the rest of the document."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("rollout")
    torch.set_num_threads(threads)


def test_quick_writes_its_section(rollout: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("# Ours\n\n<!-- rollout -->\nold\n<!-- /rollout -->\n\nkept\n")
    rollout.main(["--quick", "--write", "--document", str(document)])
    text = document.read_text()
    assert text.startswith("# Ours\n")
    assert text.endswith("\nkept\n")
    assert "old" not in text
    # The table's own check has passed: the engines wrote the same rows.
    row = next(line for line in text.splitlines() if line.startswith("| quick |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-1] == "4/4"
    assert 0.3 < float(cells[3].rstrip("%")) / 100 < 0.7
    assert "commit" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "options"), [("objective", ["--cases", "reverse_kl-frozen"]), ("step", [])])
def test_quick_needs_no_trl(
    name: str,
    options: list[str],
    rollout: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = importlib.import_module(name)
    monkeypatch.setattr(benchmark, "has_trl", lambda: False)
    if name == "objective":
        # A process of its own for one side shows that it works; each costs the seconds of importing torch and transformers.
        elsewhere = benchmark.peak_memory_elsewhere
        here = {benchmark.OURS: elsewhere, benchmark.DENSE: benchmark.peak_memory}
        monkeypatch.setattr(benchmark, "peak_memory_elsewhere", lambda side, *args: here[side](side, *args))
    document = tmp_path / "benchmarks.md"
    benchmark.main(["--quick", "--write", "--document", str(document), *options])
    text = document.read_text()
    assert f"<!-- {name} -->" in text
    assert "TRL is not installed" in text
    rows = [line for line in text.splitlines() if line.startswith(("| quick |", "| reverse_kl |"))]
    assert len(rows) == 2  # Ours and the dense computation; ours on-policy and with SWITCH.
    assert "commit" in capsys.readouterr().out


def test_a_gradient_of_another_computation_stops_it(rollout: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("objective")
    inputs = benchmark.Inputs(benchmark.QUICK)
    assert benchmark.furthest(inputs, "jensen_shannon", [benchmark.OURS, benchmark.DENSE])[benchmark.DENSE] < 1e-5
    monkeypatch.setitem(
        benchmark.SIDES, benchmark.DENSE, lambda inputs, _: 1.0001 * benchmark.ours(inputs, "forward_kl")
    )
    with pytest.raises(SystemExit, match="not the same computation"):
        benchmark.furthest(inputs, "forward_kl", [benchmark.DENSE])


def test_a_section_is_added_where_there_is_none(rollout: ModuleType, tmp_path: Path) -> None:
    timing = importlib.import_module("timing")
    document = tmp_path / "new" / "benchmarks.md"
    timing.write_section(document, "a", "first")
    timing.write_section(document, "b", "second")
    timing.write_section(document, "a", "third")
    assert document.read_text() == (
        "# Benchmarks\n\n<!-- a -->\nthird\n<!-- /a -->\n\n<!-- b -->\nsecond\n<!-- /b -->\n"
    )


def test_engines_that_differ_stop_it(rollout: ModuleType) -> None:
    from switchkd.records import Sampling
    from switchkd.rollout.law import Teacher
    from switchkd.rollout.reference import ReferenceEngine
    from tiny import tiny_pair

    engine, prompts = ReferenceEngine(tiny_pair("llama")), [[5], [6], [7], [8]]
    first, second = (engine.generate(prompts, Teacher(), Sampling(max_new_tokens=8), seed) for seed in (0, 1))
    assert rollout._same_rows(first, first) == 4
    with pytest.raises(SystemExit, match="a bug"):
        rollout._same_rows(second, first)


@pytest.mark.parametrize("case", ["quick", "evaluation", "profile"])
def test_two_commits_side_by_side(
    case: str, rollout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits, side = importlib.import_module("commits"), importlib.import_module("side")

    class Here:
        """A side in this process: one of its own shows nothing more, and costs the seconds of importing torch."""

        def __init__(self, checkout: Path, task: dict[str, Any], cache: str) -> None:
            kinds = {"rollouts": side.rollouts, "answers": side.answers, "profile": side.operators}
            # Three prompts will do.
            self.run = kinds[task["kind"]](task | {"prompts": task["prompts"][:3]})

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(commits, "Side", Here)
    monkeypatch.setattr(
        commits, "CASES", {"quick": [("quick", 8)], "evaluation": [("demo", 8)], "profile": [("quick", 8)]}
    )
    document = tmp_path / "benchmarks.md"
    commits.main(
        [
            "--old",
            str(BENCHMARKS.parent),
            "--cases",
            case,
            "--eager",
            "--repeats",
            "1",
            "--write",
            "--document",
            str(document),
        ]
    )
    rows = [line for line in document.read_text().splitlines() if line.startswith(("| quick |", "| demo |"))]
    assert [row.split("|")[2].strip() for row in rows] == [commits.OLD, commits.NEW]
    if case == "profile":
        assert all("% " in row for row in rows)
    else:
        # The same code on both sides wrote the same texts.
        assert all("| 3/3 |" in row for row in rows)


def test_both_sides_train_on_the_same_prompts(rollout: ModuleType) -> None:
    step, pairs = importlib.import_module("step"), importlib.import_module("pairs")
    pair = pairs.load("quick")
    tokenizer = step.tokenizer_of_numbers(pair)
    # With the padding's id inside other numbers, which was once taken for a token.
    prompts = [*pairs.prompts_for(pair, 4), [pair.pad_id, 10, 100, 101, pair.vocabulary_size - 1]]
    assert [tokenizer(" ".join(map(step.word, ids)))["input_ids"] for ids in prompts] == prompts
