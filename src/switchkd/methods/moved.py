"""Settings of parts that stand flat in a run file, and those that once did."""

from __future__ import annotations

from switchkd.distributions.divergences import DIVERGENCES
from switchkd.errors import UserError
from switchkd.rollout.policies import POLICIES
from switchkd.settings.components import settings_of

# SWITCH's settings stand flat as well, since people write them most. Other policies ignore them: the stages of a run share them.
HEADLINE = ("threshold", "decay", "decay_rate", "final_fraction")

# Settings that once stood flat, and where each stands now.
MOVED: dict[str, str] = {
    **{key: f"policy.{key}" for each in POLICIES.values() for key in settings_of(each) if key not in HEADLINE},
    **{key: f"divergence.{key}" for each in DIVERGENCES.values() for key in settings_of(each)},
    "target_teacher_share": "threshold.teacher_share",
    "calibration_prompts": "threshold.prompts",
    "recalibrate_every": "threshold.every",
}


def check_not_moved(key: str) -> None:
    """Raise UserError with the new place of a setting that once stood flat."""
    if place := MOVED.get(key):
        part, _, name = place.partition(".")
        raise UserError(
            f"{key} is now a setting of the {part}; write {part}: {{{name}: ...}} in the run file, or --set {place}=..."
        )
