"""The notebooks run from their first cell to their last, and hold no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


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
        exec(compile(cell, f"{name}, code cell {number}", "exec"), shared)
    # Each says what it found.
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_there_are_the_two() -> None:
    assert NAMES == ["own-pair", "parts"]
