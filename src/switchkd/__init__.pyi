from .analysis.calibration import Calibration, calibrate
from .distributions.divergences import (
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    SymmetricKL,
    TotalVariation,
)
from .errors import UserError
from .methods.config import SwitchConfig
from .methods.plan import AutoThreshold
from .methods.table import METHODS, Method
from .models.load import load_pair
from .models.pair import ModelPair
from .records import Prompt, Rollout, Sampling
from .rollout.policies import (
    AdaSwitch,
    Decision,
    Early,
    Interleave,
    Late,
    Mix,
    Policy,
    Positions,
    Student,
    Switch,
    Teacher,
)
from .rollout.reference import ReferenceEngine
from .rollout.speculative import SpeculativeEngine
from .training.trainer import SwitchTrainer

__version__: str
__all__ = [
    "METHODS",
    "AdaSwitch",
    "AdaptiveKL",
    "AlphaBeta",
    "AutoThreshold",
    "Calibration",
    "Decision",
    "Divergence",
    "Early",
    "ForwardKL",
    "Interleave",
    "JensenShannon",
    "Late",
    "Method",
    "Mix",
    "ModelPair",
    "Policy",
    "Positions",
    "Prompt",
    "ReferenceEngine",
    "ReverseKL",
    "Rollout",
    "Sampling",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "SpeculativeEngine",
    "Student",
    "Switch",
    "SwitchConfig",
    "SwitchTrainer",
    "SymmetricKL",
    "Teacher",
    "TotalVariation",
    "UserError",
    "calibrate",
    "load_pair",
]
