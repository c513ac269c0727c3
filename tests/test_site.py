"""Pages of the site that are made from code are up to date, and the check of its links sees what is wrong."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import switchkd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name: str) -> dict[str, object]:
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


def test_their_names_are_those_of_the_messages() -> None:
    made = script("their_names")["their_names_page"]()  # type: ignore[operator]
    stored = (DOCS / "their-names.md").read_text(encoding="utf-8")
    assert stored == made, "python scripts/their_names.py > docs/their-names.md"


def test_the_api_page_has_every_public_name_once() -> None:
    listed = re.findall(r"^::: switchkd\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(switchkd.__all__)


def test_every_message_of_the_troubleshooting_page_is_one() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "limits.md").read_text(encoding="utf-8"), re.MULTILINE)
    # Sentences stand in the source as texts that are joined.
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)
    assert len(rows) > 10
    assert [row for row in rows if row not in source] == []


def test_the_figures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = script("figures")
    figures["draw"](tmp_path)  # type: ignore[operator]
    assert {f"{name}.svg" for name in figures["FIGURES"]} == {path.name for path in (DOCS / "images").glob("*.svg")}  # type: ignore[attr-defined]
    for drawn in tmp_path.iterdir():
        stored = (DOCS / "images" / drawn.name).read_text(encoding="utf-8")
        # The words and numbers; lines may differ in their last digits from machine to machine.
        words = [re.findall(r"<text[^>]*>([^<]*)<", text) for text in (drawn.read_text(encoding="utf-8"), stored)]
        assert words[0] == words[1], f"python scripts/figures.py draws another {drawn.name}"
        assert len(words[0]) > 5


def test_a_notebook_becomes_a_page() -> None:
    pytest.importorskip("mkdocs")
    page = script("site_hooks")["page_of"](DOCS / "notebooks" / "parts.ipynb")  # type: ignore[operator]
    assert page.startswith("# SWITCH in 60 lines")
    assert page.count("```python") == 4
    assert "(parts.ipynb)" in page


def test_a_dead_link_stops_the_build(tmp_path: Path) -> None:
    """With the site's own settings of what is checked, on a page of its own."""
    pytest.importorskip("mkdocs")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    kept = {key: settings[key] for key in ("site_name", "validation", "use_directory_urls")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**kept, "nav": ["index.md"], "plugins": []}))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    for text, fault in (
        ("# A\n", ""),
        ("# A\n\n[x](nowhere.md)\n", "nowhere.md"),
        ("# A\n\n[x](#nowhere)\n", "#nowhere"),
    ):
        page.write_text(text)
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert bool(built.returncode) == bool(fault), built.stderr
        assert fault in built.stderr


def test_the_check_of_links_sees_what_is_wrong(tmp_path: Path) -> None:
    faults_of = script("check_site")["faults_of"]
    (tmp_path / "a.html").write_text('<p id="there"></p><a href="b.html#there">b</a><a href="https://x.example/">x</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="#there">up</a><script src="own.js"></script>')
    (tmp_path / "own.js").write_text("")
    assert faults_of(tmp_path) == []  # type: ignore[operator]
    (tmp_path / "c.html").write_text(
        '<a href="b.html#nowhere"></a><a href="d.html"></a><link rel="stylesheet" href="https://fonts.example/x.css">'
    )
    assert len(faults_of(tmp_path)) == 3  # type: ignore[operator]
