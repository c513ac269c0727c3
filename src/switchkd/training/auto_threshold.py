"""`threshold: auto`: a run that finds its own threshold, and may look for it again while the student learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from switchkd.analysis.calibration import calibrate
from switchkd.methods.config import SwitchConfig
from switchkd.records import Example
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Switch

# Where the trainer's state, and so each checkpoint, keeps what was found.
_KEY = "AutoThreshold"


class AutoThreshold:
    """The policy of a run whose threshold is calibrated before its first step and then at every `recalibrate_every`th.

    The prompts are the first `calibration_prompts` of the training data. `shape` is the Switch whose decay is kept. The
    threshold found lives in the trainer's state: a run that is resumed between two calibrations goes on with it, and one
    that is resumed where a calibration is due makes it with the student that the uninterrupted run had there.
    """

    def __init__(self, args: SwitchConfig, shape: Switch, examples: Sequence[Example]) -> None:
        self.args = args
        self.shape = shape
        self.prompts = [example.prompt for example in examples[: args.calibration_prompts]]

    def policy_at(self, state: TrainerState, engine: Engine, log: Callable[[dict[str, float]], None]) -> Switch:
        """The policy for the step that `state` is at, calibrated now where that is due; `log` is told what was found."""
        callbacks: Any = state.stateful_callbacks
        kept = callbacks[_KEY]["attributes"] if _KEY in callbacks else None
        policy = replace(self.shape, threshold=kept["threshold"]) if kept else self.shape
        step, every = state.global_step, self.args.recalibrate_every
        if kept and (kept["step"] == step or not every or step % every):
            return policy
        found = calibrate(
            engine,
            # Samples of their own: no training step draws with these addresses.
            [replace(prompt, sample_id=-1 - step) for prompt in self.prompts],
            self.args.sampling,
            teacher_share=self.args.target_teacher_share,
            policy=policy,
            seed=self.args.seed,
        )
        # Roundings differ between machines, and the processes of a run have to follow one policy.
        (threshold,) = broadcast_object_list([found.policy.threshold])
        callbacks[_KEY] = {"args": {}, "attributes": {"threshold": threshold, "step": step}}
        log({"threshold": threshold, "calibrated_teacher_share": found.measured_share})
        return replace(policy, threshold=threshold)
