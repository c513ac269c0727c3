"""Run files that come with switchkd, under the name `recipe:NAME`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from switchkd.errors import UserError, did_you_mean

RECIPE = "recipe:"


def recipes() -> dict[str, Path]:
    """The recipes by name, such as "paper/gpt2", and their files."""
    folder = Path(str(files("switchkd"))) / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe, with or without "recipe:" before its name. Raises UserError where there is no such recipe."""
    known, short = recipes(), name.removeprefix(RECIPE).removesuffix(".yaml")
    if short not in known:
        raise UserError(f"there is no recipe {short!r}{did_you_mean(short, known)} (switchkd recipes lists them)")
    return known[short]


def title(path: Path) -> str:
    """The first line of a recipe's opening comment: what it trains."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
