"""The shape of the source itself: floors, circles, sizes, and that every setting is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import transformers

import switchkd
from switchkd.distributions.divergences import DIVERGENCES
from switchkd.methods.config import SwitchConfig
from switchkd.methods.inherited import RENAMED
from switchkd.methods.parts import HEADLINE
from switchkd.methods.table import REPLACEABLE
from switchkd.rollout.policies import POLICIES

SOURCE = Path(switchkd.__file__).parent
MODULES = {
    ".".join(["switchkd", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
# From the ground up. A room (a folder, or a file at the top level) imports rooms of lower floors only.
FLOORS = [
    {"errors", "files", "positions", "progress"},
    {"records", "settings", "web"},
    {"distributions", "models"},
    {"data", "rollout"},
    {"loss", "evaluation", "serving"},
    {"methods", "analysis", "scale"},
    {"report", "training"},
    {"run"},
    {"study"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports: in functions too, and for types alone too."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            # `from switchkd.data import world` imports a module, and the room's own file only on the way to it.
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules or {node.module}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name in MODULES and name != "switchkd"}


def room_of(module: str) -> str:
    return module.split(".")[1]


ROOMED = [module for module in MODULES if module != "switchkd"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in ROOMED} == FLOOR_OF.keys()


@pytest.mark.parametrize("module", ROOMED)
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    up = {name for name in own_imports(module) if room_of(name) != room and FLOOR_OF[room_of(name)] >= FLOOR_OF[room]}
    assert not up


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: own_imports(module) for module in ROOMED}
    assert "switchkd.distributions.divergences" in graph["switchkd.rollout.log"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", [each for each in ROOMED if room_of(each) in ("records", "distributions")])
def test_the_mathematics_knows_no_model(module: str) -> None:
    assert not {name for name in imports(module) if name.split(".")[0] in ("transformers", "datasets", "accelerate")}


def test_what_an_import_brings_in() -> None:
    """One process for all, since each costs the seconds in which torch and transformers are imported."""
    program = """
import sys
def brought(*names): print([name for name in names if name in sys.modules])
import switchkd
brought("torch", "transformers", "vllm", "datasets", "peft")
import switchkd.training.checkpoints
brought("torch", "transformers", "accelerate")
from switchkd import ModelPair, ReferenceEngine, Switch, load_pair
import switchkd.data.rows, switchkd.data.sets, switchkd.data.collate
brought("vllm", "datasets", "peft")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines() == ["[]", "[]", "[]"]


def test_every_public_name_is_there_and_listed() -> None:
    assert {"Switch", "SwitchTrainer", "load_pair"} <= set(switchkd.__all__)
    assert {"METHODS", "evaluate", "diagnose", "distillation_loss", "train_run"} <= set(switchkd.__all__)
    assert {part.__name__ for part in (*POLICIES.values(), *DIVERGENCES.values())} <= set(switchkd.__all__)
    # A type checker takes a name of a stub as public where it is imported as itself.
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    listed = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.name == alias.asname for alias in listed)
    assert sorted(alias.name for alias in listed) == sorted(switchkd.__all__)
    for name in switchkd.__all__:
        assert getattr(switchkd, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = switchkd.nothing_of_that_name


# A file fits a head, a function a screen.
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 350, 50, 7


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    assert MODULES[module].stem not in ("utils", "util", "helpers", "misc", "common")
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([each for each in given if each.arg not in ("self", "cls")]) <= MOST_PARAMETERS, node.name


def own_settings() -> list[dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return [field for field in dataclasses.fields(SwitchConfig) if field.init and field.name not in inherited]


def test_every_setting_is_read_somewhere() -> None:
    own = {field.name for field in own_settings()}
    read = {
        node.attr
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Those of rows and of SWITCH are read by the names in their lists; test_methods.py sees it done.
    by_name = {*REPLACEABLE, *HEADLINE}
    assert by_name <= own
    # Where transformers has not the newer names yet, they are ours, and handed on by name.
    handed_on = {newer for _, newer in RENAMED}
    assert not own - read - by_name - handed_on


def test_every_setting_carries_its_sentence() -> None:
    for field in dataclasses.fields(SwitchConfig):
        assert not field.init or len(field.metadata.get("help", "")) > 10, field.name
