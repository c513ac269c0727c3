"""What a run gives for a component, as an object, a name or a mapping, and the settings that have moved into one."""

from __future__ import annotations

from typing import Any

from switchkd.distributions.divergences import DIVERGENCE, DIVERGENCES
from switchkd.errors import UserError
from switchkd.loss.targets import TARGET
from switchkd.loss.weight import Weight
from switchkd.loss.weights import WEIGHT
from switchkd.methods.plan import AutoThreshold, TopK
from switchkd.methods.text import LENGTH_GROWTH, REPLAYED_PREFIX, REWRITE, LengthGrowth, ReplayedPrefix, Rewrite
from switchkd.rollout.policies import POLICIES, POLICY
from switchkd.settings.components import Registry, settings_of

# The threshold that a run finds itself.
AUTO = "auto"
_THRESHOLD = Registry("threshold", "switchkd.thresholds", AutoThreshold, {AUTO: AutoThreshold})
TEACHER_SIGNAL = Registry("teacher_signal", "switchkd.teacher_signals", TopK, {"top_k": TopK})
# The registries of the components that replace a row's one for one.
COMPONENTS: dict[str, Registry[Any]] = {
    "divergence": DIVERGENCE,
    "teacher_text_divergence": DIVERGENCE,
    "target": TARGET,
    "start_divergence": DIVERGENCE,
    "replayed_prefix": REPLAYED_PREFIX,
    "length_growth": LENGTH_GROWTH,
    "rewrite": REWRITE,
}
# What settings without a name change where the row has nothing.
DEFAULTS: dict[str, Any] = {
    "replayed_prefix": ReplayedPrefix(),
    "length_growth": LengthGrowth(),
    "rewrite": Rewrite(),
}
# What a plan and its objective take from a method under the same name.
OF_LOSS = (
    "cross_entropy_weight", "target", "start_weight", "start_divergence", "teacher_text_divergence", "long_term_weight",
)  # fmt: skip
OF_TEXT = (
    "teacher_text_share", "share_rise", "replay_capacity", "replay_share", "replayed_prefix", "length_growth", "rewrite",
)  # fmt: skip
# What nothing reads where nothing is rolled out.
OF_ROLLOUTS = (
    "policy", "teacher_text_share", "replay_capacity", "replay_share", "long_term_weight", "replayed_prefix", "length_growth",
    "rewrite", "teacher_text_divergence",
)  # fmt: skip
# SWITCH's settings stand flat as well, since people write them most. Other policies ignore them: the stages of a run share them.
HEADLINE = ("threshold", "decay", "decay_rate", "final_fraction")

# Settings that once stood flat, and where each stands now.
MOVED: dict[str, str] = {
    **{key: f"policy.{key}" for each in POLICIES.values() for key in settings_of(each) if key not in HEADLINE},
    **{key: f"divergence.{key}" for each in DIVERGENCES.values() for key in settings_of(each)},
    "target_teacher_share": "threshold.teacher_share",
    "calibration_prompts": "threshold.prompts",
    "recalibrate_every": "threshold.every",
    "student_token_weight": "weight.student",
    "teacher_token_weight": "weight.teacher",
}


def check_not_moved(key: str) -> None:
    """Raise UserError with the new place of a setting that once stood flat."""
    if key == "train_on":
        raise UserError(
            "train_on is now a weight; write weight: {name: by_writer, teacher: 0} to train on the student's tokens alone"
        )
    if place := MOVED.get(key):
        of, _, name = place.partition(".")
        part = {"weight": "weight by_writer"}.get(of, of)
        raise UserError(
            f"{key} is now a setting of the {part}; write {of}: {{{name}: ...}} in the run file, or --set {place}=..."
        )


def weights_of(given: Any, row: tuple[Weight, ...], max_new_tokens: int) -> tuple[Weight, ...]:
    """The weights of a run from what it gives, else the row's. Settings without a name change the row's only one."""
    parts = row if given is None else given if isinstance(given, list | tuple) else [given]
    default = row[0] if len(parts) == len(row) == 1 else None
    return tuple(WEIGHT.make(part, default=default).for_length(max_new_tokens) for part in parts)


def auto_threshold(threshold: Any) -> AutoThreshold | None:
    """What `threshold: auto` asks for, as a word, a mapping or an object; None for a number."""
    if threshold is None or isinstance(threshold, float | int):
        return None
    if isinstance(threshold, str) and threshold != AUTO:
        raise UserError(f"threshold is {threshold!r}; it has to be a number of nats, or {AUTO}")
    return _THRESHOLD.make(threshold, default=AutoThreshold())


def described(value: Any) -> Any:
    """A component, or a list of them, as the mappings that make them again; anything else as it is."""
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    registries: list[Registry[Any]] = [POLICY, WEIGHT, TEACHER_SIGNAL, *COMPONENTS.values()]
    registry = next((each for each in registries if isinstance(value, each.base)), None)
    return value if registry is None else registry.describe(value)
