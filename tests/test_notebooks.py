"""The notebooks run from their first cell to their last, and hold no output."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
# What is made smaller, as in pages.py: fewer steps show that a cell works, and half as long texts that two engines write the same.
SMALLER = (
    (r'"max_steps": \d+', '"max_steps": 2'),
    (r"for step in range\(\d+\)", "for step in range(2)"),
    (r"(longest|max_new_tokens)=48", r"\1=24"),
)


def code_of(name: str) -> list[str]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]], "clear all outputs before saving"
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shared: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code_of(name)):
        for pattern, smaller in SMALLER:
            cell = re.sub(pattern, smaller, cell)
        exec(compile(cell, f"{name}, code cell {number}", "exec"), shared)
    # Each says what it found.
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_what_is_made_smaller_is_there() -> None:
    cells = "".join(cell for name in NAMES for cell in code_of(name))
    assert all(re.search(pattern, cells) for pattern, _ in SMALLER)


def test_there_are_the_two() -> None:
    assert NAMES == ["own-pair", "parts"]
