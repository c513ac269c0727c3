"""Says so where the teacher writes next to nothing, or next to everything, in the first steps of SWITCH."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.methods.plan import Plan
from switchkd.rollout.policies import Switch
from switchkd.settings.paper import DEFAULT_SHARE

# Log lines that are looked at, and the shares between which the method is neither of its two ends.
_LINES = 3
LEAST, MOST = 0.01, 0.95


def teacher_share_alarm(plan: Plan) -> TeacherShareAlarm | None:
    """The alarm of a run whose policy is a Switch, else None."""
    return TeacherShareAlarm() if plan.rolls_out and isinstance(plan.policy, Switch) else None


class TeacherShareAlarm(TrainerCallback):
    """Warns once, after the first three log lines of a run, if their mean teacher share is under 1 % or over 95 %."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a line's share in."""
        share = kwargs["logs"].get("teacher_share")
        if share is None:
            return
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        if len(self._shares) == _LINES and state.is_world_process_zero and not LEAST <= mean <= MOST:
            few = mean < LEAST
            logging.getLogger(__name__).warning(
                f"the teacher wrote {mean:.1%} of the tokens up to step {state.global_step}: this is distillation on "
                f"{'the student' if few else 'the teacher'}'s text alone; take a {'lower' if few else 'higher'} threshold, "
                f"or threshold: auto, which finds one for {DEFAULT_SHARE:.0%} (switchkd calibrate shows the divergences)"
            )
