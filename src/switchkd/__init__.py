"""Distil language models with the teacher in the loop of the student's own generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchkd.analysis.calibration import Calibration, calibrate
    from switchkd.errors import UserError
    from switchkd.methods.config import SwitchConfig
    from switchkd.models.pair import ModelPair, load_pair
    from switchkd.records import Prompt, Rollout, Sampling
    from switchkd.rollout.policies import Student, Switch, Teacher
    from switchkd.rollout.reference import ReferenceEngine
    from switchkd.rollout.speculative import SpeculativeEngine
    from switchkd.training.trainer import SwitchTrainer

__version__ = "0.1.0"

_HOME = {
    "Calibration": "analysis.calibration",
    "ModelPair": "models.pair",
    "Prompt": "records",
    "ReferenceEngine": "rollout.reference",
    "Rollout": "records",
    "Sampling": "records",
    "SpeculativeEngine": "rollout.speculative",
    "Student": "rollout.policies",
    "Switch": "rollout.policies",
    "SwitchConfig": "methods.config",
    "SwitchTrainer": "training.trainer",
    "Teacher": "rollout.policies",
    "UserError": "errors",
    "calibrate": "analysis.calibration",
    "load_pair": "models.pair",
}

__all__ = [
    "Calibration",
    "ModelPair",
    "Prompt",
    "ReferenceEngine",
    "Rollout",
    "Sampling",
    "SpeculativeEngine",
    "Student",
    "Switch",
    "SwitchConfig",
    "SwitchTrainer",
    "Teacher",
    "UserError",
    "calibrate",
    "load_pair",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'switchkd' has no attribute {name!r}")
    return getattr(import_module(f"switchkd.{_HOME[name]}"), name)
