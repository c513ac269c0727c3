"""Run files that come with switchkd, under the name `recipe:NAME`, and files that say to accelerate how to start one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from switchkd.errors import UserError, did_you_mean

RECIPE = "recipe:"
_LAUNCH = "accelerate/"


def recipes() -> dict[str, Path]:
    """The run files by name, such as "paper/gpt2"."""
    return {name: path for name, path in _files().items() if not name.startswith(_LAUNCH)}


def launch_files() -> dict[str, Path]:
    """The configurations of `accelerate launch` by name, such as "accelerate/fsdp2"."""
    return {name: path for name, path in _files().items() if name.startswith(_LAUNCH)}


def _files() -> dict[str, Path]:
    folder = Path(str(files("switchkd"))) / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe, with or without "recipe:" before its name. Raises UserError where there is no such recipe."""
    return _named(name, recipes())


def shown_file(name: str) -> Path:
    """As `recipe_file`, for the launch files as well."""
    return _named(name, _files())


def _named(name: str, known: dict[str, Path]) -> Path:
    short = name.removeprefix(RECIPE).removesuffix(".yaml")
    if short not in known:
        raise UserError(f"there is no recipe {short!r}{did_you_mean(short, known)} (switchkd recipes lists them)")
    return known[short]


def title(path: Path) -> str:
    """The first line of a recipe's opening comment: what it trains."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
