"""Parts from outside: the example of docs/extending.md as a module and as an installed package, trained from a run file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from runs import switchkd, write_run
from switchkd.distributions.divergences import DIVERGENCE
from switchkd.errors import UserError
from switchkd.loss.targets import TARGET
from switchkd.loss.weights import WEIGHT
from switchkd.methods.config import SwitchConfig
from switchkd.methods.table import METHOD
from switchkd.rollout.policies import POLICY
from switchkd.run.callbacks import read_log

EXTENDING = Path(__file__).parents[1] / "docs" / "extending.md"
MINE = """

from switchkd import Method

MINE = Method("mine", policy=EveryThird(), divergence=SquaredDistance(), student_share=1.0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example in a module of its own name in the working folder, as a researcher has it."""
    example = re.search(r"<!-- example: my_parts.py -->\n```python\n(.*?)```", EXTENDING.read_text(), re.DOTALL)
    assert example is not None
    name = f"parts_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(example[1] + MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_parts_from_outside_train(models: Path, tmp_path: Path, module: str) -> None:
    policy = {"name": f"{module}:EveryThird", "period": 2}
    parts = {"policy": policy, "divergence": f"{module}:SquaredDistance", "target": f"{module}:Softer"}
    run = write_run(models, tmp_path, weight=[f"{module}:EveryOther", "importance"], max_steps=2, **parts)
    changes = ("--set", "divergence.scale=2.0", "--set", f"weight.0={{name: '{module}:EveryOther', first: 1}}")
    assert switchkd("train", run, *changes) == 0
    losses = [event for event in read_log(tmp_path / "out" / "log.jsonl") if "loss" in event]
    # Up to 6 tokens a response, of which the teacher writes the 2nd, 4th and 6th.
    assert all(1 / 3 <= event["teacher_share"] <= 1 / 2 for event in losses)
    assert all(0 < event["divergence"] <= 4 for event in losses)
    saved = (tmp_path / "out" / "run.yaml").read_text()
    assert all(f"{module}:{part}" in saved for part in ("EveryThird", "EveryOther", "Softer"))
    assert switchkd("train", tmp_path / "out" / "run.yaml", "--resume", "--set", "max_steps=3") == 0


def test_a_method_from_outside_trains(models: Path, tmp_path: Path, module: str) -> None:
    run = write_run(models, tmp_path, method=f"{module}:MINE", max_steps=1)
    assert switchkd("train", run, "--set", "policy.period=2") == 0


def test_a_policy_from_outside_rolls_out(models: Path, tmp_path: Path, module: str) -> None:
    pair = (
        "--student",
        models / "student",
        "--teacher",
        models / "teacher",
        "--prompt",
        "one",
        "--max-new-tokens",
        "4",
    )
    for given in ([f"{module}:EveryThird", "--period", "2"], [f"{{name: '{module}:EveryThird', period: 2}}"]):
        assert switchkd("rollout", *pair, "--force", "--policy", *given) == 0
        assert '"written_by_teacher": [false, true' in (tmp_path / "rollouts.jsonl").read_text()


def test_an_installed_package_gives_its_parts_short_names(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry points as pip leaves them: a folder of metadata beside the module, on the path."""
    metadata = tmp_path / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = {
        "policies": f"every_third = {module}:EveryThird",
        "divergences": f"squared = {module}:SquaredDistance",
        "methods": f"mine = {module}:MINE",
        "weights": f"every_other = {module}:EveryOther",
        "targets": f"softer = {module}:Softer",
    }
    text = "".join(f"[switchkd.{group}]\n{line}\n" for group, line in lines.items())
    (metadata / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (POLICY, DIVERGENCE, METHOD, WEIGHT, TARGET):
        # Looked up once a process; it is looked up again after this test too.
        monkeypatch.setitem(vars(registry), "_installed", None)
        del vars(registry)["_installed"]
    plan = SwitchConfig(
        output_dir="unused", policy={"name": "every_third", "period": 5}, divergence={"name": "squared", "scale": 2.0}
    ).plan
    assert (plan.policy.period, plan.objective.divergence.scale) == (5, 2.0)
    parts = SwitchConfig(
        output_dir="unused", weight=["every_other", "uniform"], target={"name": "softer"}
    ).plan.objective
    assert (parts.weights[0].first, parts.target.temperature) == (0, 2.0)
    assert SwitchConfig(output_dir="unused", method="mine").plan.policy.period == 3
    with pytest.raises(UserError, match=r"choose one of student, .*, every_third, or module:NAME"):
        POLICY.make("none")


@pytest.mark.parametrize(
    ("registry", "name", "message"),
    [
        (POLICY, "none_there:Foo", "policy 'none_there:Foo' cannot be imported"),
        (POLICY, "switchkd.records:Nothing", "cannot be imported"),
        (
            POLICY,
            "switchkd.records:Prompt",
            "has to be a frozen dataclass that extends switchkd.rollout.law.Policy",
        ),
        (DIVERGENCE, "switchkd.rollout.policies:Switch", "extends switchkd.distributions.divergences.Divergence"),
        (METHOD, "switchkd.records:Prompt", "extends switchkd.methods.table.Method"),
        (WEIGHT, "switchkd.loss.targets:Proximal", "extends switchkd.loss.weight.Weight"),
        (TARGET, "switchkd.loss.weights:Prefix", "extends switchkd.loss.targets.Target"),
        (POLICY, "switchkd.rollout.law:Policy", "has to be a frozen dataclass"),
    ],
)
def test_what_is_no_part_is_refused(registry, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.make(name)


def test_settings_of_a_part_from_outside_are_typed_and_named(module: str) -> None:
    with pytest.raises(UserError, match=r"policy\.period is 'x'; it has to be a whole number"):
        SwitchConfig(output_dir="unused", policy={"name": f"{module}:EveryThird", "period": "x"})
    with pytest.raises(UserError, match=rf"speed is 1, but policy '{module}:EveryThird' takes period; leave it out"):
        SwitchConfig(output_dir="unused", policy={"name": f"{module}:EveryThird", "speed": 1})
