"""What pyproject.toml says of other packages is true: all that is imported is declared, and `make test-lowest` takes the lowest."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Installed under another name than they are imported by.
NAMES = {"yaml": "pyyaml"}


def declared(lines: list[str]) -> dict[str, str]:
    """The lowest release of each requirement."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(?:[>=]=([0-9.]+))?.*", line)
        assert match is not None, line
        found[match[1].lower().replace("-", "_")] = match[2]
    return found


def imported() -> set[str]:
    roots: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.partition(".")[0])
    return {NAMES.get(root, root) for root in roots - sys.stdlib_module_names - {"switchkd"}}


def test_all_that_is_imported_is_declared_and_the_other_way_round() -> None:
    always = declared(PROJECT["dependencies"])
    extras = {name for lines in PROJECT["optional-dependencies"].values() for name in declared(lines)}
    # Reporters hand over pandas' tables where a tool that brings it asks for them; DeepSpeed is there where a weight is its own.
    assert imported() - extras - {"pandas", "deepspeed"} == always.keys()


def test_the_lowest_releases_are_the_ones_that_are_tested() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned == declared(PROJECT["dependencies"])
