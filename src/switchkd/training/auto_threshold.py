"""`threshold: auto`: a run that calibrates its own threshold, and may do so again while the student learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from switchkd.analysis.calibration import calibrate
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import AutoThreshold
from switchkd.records import Example, Prompt
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Switch
from switchkd.training.kept_state import kept_state
from switchkd.training.shared_teacher import let_others_read


def calibration_prompts(examples: Sequence[Example], count: int) -> list[Prompt]:
    """`count` prompts of the training data, spread evenly over it.

    Sources stand one after the other, each perhaps with a teacher of its own, and a file may be sorted: the first prompts would
    be of one kind.
    """
    count = min(count, len(examples))
    return [examples[row * len(examples) // count].prompt for row in range(count)]


class CalibratedPolicy:
    """The policy of a run whose threshold is calibrated before its first step and then at every `auto.every`th.

    Where several steps are written at once, a calibration that is due between them comes before the next that are. `prompts`
    are those of `calibration_prompts`. `shape` is the Switch whose decay is kept. The threshold is kept in the trainer's state. A
    run resumed between two calibrations uses it. A run resumed where a calibration is due repeats that calibration, with the
    same student.
    """

    def __init__(self, auto: AutoThreshold, shape: Switch, args: SwitchConfig, prompts: Sequence[Prompt]) -> None:
        self.auto = auto
        self.shape = shape
        self.args = args
        self.prompts = prompts

    def policy_at(
        self, state: TrainerState, engine: Engine, log: Callable[[dict[str, float]], None], longest: int
    ) -> Switch:
        """The policy for the step that `state` is at, calibrated now where that is due; `log` gets what was found.

        `longest` is that of the step's rollouts, in tokens: the threshold falls over it.
        """
        kept, step = kept_state(state, "auto_threshold"), state.global_step
        policy = replace(self.shape, threshold=kept["threshold"]) if kept else self.shape
        # Not each step comes up here: `rollout_steps` of them are written at once.
        if kept and (not self.auto.every or step // self.auto.every == kept["step"] // self.auto.every):
            return policy
        found = calibrate(
            engine,
            # Samples of their own: no training step draws with these addresses.
            [replace(prompt, sample_id=-1 - step) for prompt in self.prompts],
            replace(self.args.sampling, max_new_tokens=longest),
            teacher_share=self.auto.teacher_share,
            policy=policy,
            seed=self.args.seed,
        )
        # Rounding differs between machines, and the processes of a run have to follow one policy.
        let_others_read()
        (threshold,) = broadcast_object_list([found.policy.threshold])
        kept.update(threshold=threshold, step=step)
        log({"threshold": threshold, "calibrated_teacher_share": found.measured_share})
        return replace(policy, threshold=threshold)
