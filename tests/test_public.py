"""What is public changes only on purpose, and the version stands in one place."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import switchkd

ROOT = Path(__file__).parents[1]


def test_the_list_of_what_is_public_is_true() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "public_api.py"))["public_page"]()
    stored = (ROOT / "docs" / "public.md").read_text(encoding="utf-8")
    assert stored == made, "python scripts/public_api.py > docs/public.md, and say so in CHANGELOG.md"


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "switchkd.__version__"}
    assert f"version: {switchkd.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
