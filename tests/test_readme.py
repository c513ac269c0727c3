"""What README.md shows works: its run file is one, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from switchkd.distributions.divergences import JensenShannon
from switchkd.rollout.policies import Switch
from switchkd.run.file import run_from_values

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(found)


def test_the_run_file_is_one() -> None:
    (stage,) = run_from_values({"output_dir": "runs/run", **yaml.safe_load(block("yaml"))}, "in README.md").in_stages()
    assert stage.config.plan.policy == Switch(0.3)
    assert stage.config.plan.objective.divergence == JensenShannon(teacher_weight=0.1)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("python").replace('"path-or-hub-id"', '"world:{}"')
    for role in ("student", "teacher"):
        code = code.replace("{}", role, 1)
    shown: dict[str, object] = {}
    exec(
        code.replace("max_new_tokens=128", "max_new_tokens=8").replace("max_new_tokens=256", "max_new_tokens=8"), shown
    )
    assert len(shown["r"].token_ids) == len(shown["r"].threshold) > 0  # type: ignore[attr-defined]


def test_it_stays_short() -> None:
    assert len(README.splitlines()) < 120
