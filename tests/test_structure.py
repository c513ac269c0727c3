"""The shape of the source itself: who imports whom, how long files are, and that no setting is read by nobody."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import transformers

import switchkd
from switchkd.distributions.divergences import DIVERGENCE_SETTINGS
from switchkd.methods.config import SwitchConfig
from switchkd.methods.table import METHODS, ROW_SETTINGS

SOURCE = Path(switchkd.__file__).parent
MODULES = {
    ".".join(["switchkd", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that one imports, in functions too, but for those that serve annotations alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(module)]
    while waiting:
        node = waiting.pop()
        if _is_for_types_alone(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | {name for name in names if name in MODULES}
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


@cache
def reaches(module: str) -> frozenset[str]:
    """The package's own modules that importing one brings in, itself left out."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = {name for name in imports(waiting.pop()) if name in MODULES} - found
        found |= new
        waiting += new
    return frozenset(found - {module, "switchkd"})


def named(*prefixes: str) -> list[str]:
    full = [f"switchkd.{prefix}" for prefix in prefixes]
    return [module for module in MODULES if any(module == name or module.startswith(f"{name}.") for name in full)]


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 15
    assert "switchkd.distributions.divergences" in reaches("switchkd.rollout.reference")


COMMAND_LINE = ("cli",)
MATHEMATICS = ("records", "errors", "distributions", "positions")


@pytest.mark.parametrize("module", named(*MATHEMATICS))
def test_the_mathematics_knows_no_model_engine_objective_or_trainer(module: str) -> None:
    assert reaches(module) <= set(named(*MATHEMATICS))
    assert not {name for name in imports(module) if name.split(".")[0] in ("transformers", "datasets", "accelerate")}


@pytest.mark.parametrize("module", named("rollout", "objective"))
def test_engines_and_objective_know_no_trainer_and_no_configuration(module: str) -> None:
    assert not reaches(module) & set(named("trainer", "config", "methods", "run", *COMMAND_LINE))


@pytest.mark.parametrize("module", named("rollout"))
def test_engines_know_no_objective(module: str) -> None:
    assert not reaches(module) & set(named("objective"))


@pytest.mark.parametrize("module", [module for module in MODULES if module not in named(*COMMAND_LINE, "__main__")])
def test_nothing_imports_the_command_line(module: str) -> None:
    assert not imports(module) & set(named(*COMMAND_LINE))


def test_importing_the_package_brings_in_neither_vllm_nor_datasets() -> None:
    program = """
import sys
import switchkd
print([name for name in ("torch", "transformers", "vllm", "datasets", "peft") if name in sys.modules])
from switchkd import ModelPair, ReferenceEngine, Switch, load_pair
print([name for name in ("vllm", "datasets", "peft") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split("\n") == ["[]", "[]", ""]


def test_every_public_name_is_there_and_listed() -> None:
    for name in switchkd.__all__:
        assert getattr(switchkd, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = switchkd.nothing_of_that_name


# A file fits a head: about 400 lines.
LONGEST = 400


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_and_none_is_a_drawer(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert MODULES[module].stem not in ("utils", "util", "helpers", "misc", "common")


def test_every_setting_is_read_somewhere() -> None:
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    own = {field.name for field in dataclasses.fields(SwitchConfig)} - inherited
    assert "threshold" in own
    read = {
        node.attr
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Those of divergences, of rows and of policies are read by the names in their tables; test_methods.py sees it done.
    by_name = {*DIVERGENCE_SETTINGS, *ROW_SETTINGS, *(key for row in METHODS.values() for key in row.policy_settings)}
    assert by_name <= own
    assert not own - read - by_name


def test_every_setting_carries_its_sentence() -> None:
    for field in dataclasses.fields(SwitchConfig):
        assert len(field.metadata.get("help", "")) > 10, field.name
