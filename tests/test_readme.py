"""README.md says in its run file what it says beside it, and stays short; test_pages.py runs what it shows."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_it_stays_short() -> None:
    assert len(README.splitlines()) < 120
