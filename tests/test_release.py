"""What a release needs: an address in one place, a readme that an index can show, and everything in the package."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LINK = r"!?\[[^\]]*\]\(([^)]+)\)"


def test_the_readme_of_an_index_has_absolute_links_to_files_that_are_there() -> None:
    readme = runpy.run_path(str(ROOT / "setup.py"))["readme_for_an_index"]()
    repository = PROJECT["urls"]["Repository"]
    ours = [re.match(rf"{repository}/(blob|raw)/main/([^#]+)", link) for link in re.findall(LINK, readme)]
    found = [match for match in ours if match]
    assert len(found) > 10
    assert all((ROOT / match[2]).exists() for match in found)
    assert {match[1] for match in found if match[2].endswith(".png")} == {"raw"}
    assert all(link.startswith("https://") for link in re.findall(LINK, readme))


def test_the_address_stands_in_one_place() -> None:
    repository = PROJECT["urls"]["Repository"]
    assert all(url.startswith(repository) for url in PROJECT["urls"].values())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"] == repository


def test_everything_that_the_package_reads_is_packed() -> None:
    source = ROOT / "src" / "switchkd"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["switchkd"]
    packed = {path for pattern in patterns for path in source.glob(pattern)}
    there = {path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in there - packed if path.suffix != ".py"} == set()


def test_versions_of_python_are_those_that_torch_has() -> None:
    """Wheels of torch 2.13.0 for Linux exist for these, looked up on 2026-11-28; the suite has run on 3.11."""
    claimed = {
        each.rpartition(" ")[2]
        for each in PROJECT["classifiers"]
        if each.startswith("Programming Language :: Python :: 3.")
    }
    assert claimed == {"3.11", "3.12", "3.13", "3.14"}
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_embedded_pair_has_a_card_with_a_license() -> None:
    card = (ROOT / "src" / "switchkd" / "assets" / "world" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["license"] == PROJECT["license"].lower()
