"""What the trainer carries out: a method with a run's settings filled in. What does not fit together is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from switchkd.errors import UserError
from switchkd.loss.objective import Objective
from switchkd.loss.weights import WEIGHT
from switchkd.methods.text import LengthGrowth, ReplayedPrefix, Rewrite
from switchkd.rollout.engine import KeepTeacher
from switchkd.rollout.law import Policy
from switchkd.settings.components import setting
from switchkd.settings.paper import DEFAULT_SHARE


@dataclass(frozen=True)
class AutoThreshold:
    """`threshold: auto`: the run calibrates its threshold before the first step. Raises UserError for values out of range."""

    teacher_share: float = setting(DEFAULT_SHARE, "The share of tokens that the teacher is to write, inside 0..1.")
    prompts: int = setting(64, "The number of training prompts that it is calibrated on, spread evenly over the data.")
    every: int = setting(0, "Calibrate again every this many steps, as the student learns; 0 is never.")

    def __post_init__(self) -> None:
        if not 0 < self.teacher_share < 1:
            raise UserError(f"threshold.teacher_share is {self.teacher_share}; it has to be above 0 and below 1")
        if self.prompts < 1:
            raise UserError(f"threshold.prompts is {self.prompts}; it has to be at least 1")
        if self.every < 0:
            raise UserError(f"threshold.every is {self.every}; give a number of steps, or 0 for never")


@dataclass(frozen=True)
class TopK:
    """Of what the teacher says, its likeliest ids alone are kept, and one number for all others. Raises UserError below 1."""

    top_k: int = setting(64, "How many of the teacher's likeliest ids are kept of each token.")

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"teacher_signal.top_k is {self.top_k}; keep at least 1 id, or leave teacher_signal out")


@dataclass(frozen=True)
class Plan:
    """What the trainer carries out. Raises UserError for shares out of range, and for parts that contradict each other.

    Of the sequences, `rollout_share` are rolled out (with `share_rise`, at the start). The teacher alone writes
    `teacher_text_share` of these, and `policy` the others. `auto_threshold` calibrates the threshold of a Switch
    (training/auto_threshold.py). `teacher_signal` says what is kept of the teacher for the loss; None: its whole
    distributions. `teacher_text` is the file of the teacher's text that replaces the data set's. text.py
    has the starts, lengths and rewriting of rollouts.
    """

    policy: Policy
    rollout_share: float
    objective: Objective
    auto_threshold: AutoThreshold | None = None
    teacher_text_share: float = 0.0
    share_rise: float = 0.0
    replay_capacity: int = 0
    replay_share: float = 0.0
    teacher_text: Path | None = None
    replayed_prefix: ReplayedPrefix | None = None
    length_growth: LengthGrowth | None = None
    rewrite: Rewrite | None = None
    teacher_signal: TopK | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rollout_share <= 1:
            raise UserError(
                f"student_share is {self.rollout_share}; it is the share of sequences rolled out, from 0 to 1"
            )
        for key in ("teacher_text_share", "share_rise", "replay_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key} is {getattr(self, key)}; it is a share of sequences, from 0 to 1")
        if not self.replay_capacity >= 0:
            raise UserError(f"replay_capacity is {self.replay_capacity}; give a number of rollouts, or 0 for none")
        self._check_cross_entropy()
        self._check_long_term()
        self._check_weights()
        self._check_rewrite()

    @property
    def kept_of_teacher(self) -> KeepTeacher:
        """What an engine is asked to keep of the teacher for the loss."""
        return self.teacher_signal.top_k if self.teacher_signal else "hidden"

    @property
    def rolls_out(self) -> bool:
        """Whether any sequence is ever rolled out."""
        return self.rollout_share > 0 or self.share_rise > 0

    @property
    def trains_data_alone(self) -> bool:
        """Whether all text is the data set's own."""
        return not self.rolls_out and self.teacher_text is None

    @property
    def needs_response(self) -> bool:
        """Whether the data set has to give responses: where its text is trained on, or rollouts begin with it."""
        return (self.rollout_share < 1 or self.replayed_prefix is not None) and self.teacher_text is None

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to be loaded, for the text or for the loss."""
        writes = self.rolls_out and (self.policy.needs_teacher or self.teacher_text_share > 0)
        reads = self.teacher_text is not None or self.rewrite is not None or self.objective.reads_logp
        return self.objective.divergence is not None or reads or writes

    def longest_rollout(self, step: int, max_new_tokens: int) -> int:
        """The longest rollout that is of use at a step, in tokens."""
        ends = [weight.longest for weight in self.objective.weights if weight.longest is not None]
        longest = min([max_new_tokens, *ends])
        return self.length_growth.limit(step, longest) if self.length_growth else longest

    def _check_cross_entropy(self) -> None:
        objective = self.objective
        teacher_writes = "teacher" in writers_of(self.policy, self.teacher_text_share)
        acts = {"data": False, "data+teacher": teacher_writes, "all": True}[objective.cross_entropy_on]
        if acts or self.rollout_share < 1:
            return
        of_whom = "text of the data set" + ("" if objective.cross_entropy_on == "data" else " and of the teacher")
        instead = "data+teacher" if teacher_writes else "all"
        if objective.divergence is None:
            raise UserError(
                f"the loss is cross-entropy alone, on {of_whom}, but all text here is rolled out"
                f"{'' if teacher_writes else ' by the student'}; set cross_entropy_on to {instead}, or take a divergence"
            )
        begun = self.replayed_prefix is not None and self.replayed_prefix.weight > 0
        if objective.cross_entropy_weight > 0 and not (self.rewrite or begun):
            raise UserError(
                f"cross_entropy_weight is {objective.cross_entropy_weight}, on {of_whom}, but all text here is rolled out"
                f"{'' if teacher_writes else ' by the student'}, so it would do nothing; lower student_share, set cross_entropy_on "
                f"to {instead}, or leave it out"
            )

    def _check_long_term(self) -> None:
        weight = self.objective.long_term_weight
        if weight and self.replay_capacity:
            raise UserError(
                f"long_term_weight is {weight}, which needs text of the student as it is now; set replay_capacity to 0"
            )

    def _check_rewrite(self) -> None:
        """Raise UserError for a setting that would have no effect on text that the teacher rewrites."""
        objective = self.objective
        without_effect = {
            "replayed_prefix": self.replayed_prefix is not None,
            "replay_capacity": self.replay_capacity > 0,
            "long_term_weight": objective.long_term_weight > 0,
            "teacher_text_divergence": objective.teacher_text_divergence is not None,
        }
        for key, is_set in without_effect.items():
            if self.rewrite and is_set:
                raise UserError(
                    f"{key} is set, but it acts on rollouts as they were written, and rewrite trains on what the teacher makes "
                    f"of them; leave one of the two out"
                )

    def _check_weights(self) -> None:
        """Raise UserError where the weights act on nothing, or leave no token of the rollouts."""
        weights = self.objective.weights
        of_rollouts = [WEIGHT.name_of(type(weight)) for weight in weights if weight.of_rollouts_alone]
        if of_rollouts and (not self.rolls_out or self.rewrite):
            kind = "text that the teacher rewrites" if self.rewrite else "no rollouts"
            raise UserError(
                f"weight {of_rollouts[0]} acts on the tokens of rollouts, but this method trains on {kind} here; leave it out"
            )
        # Also where only part of the text is rolled out: each rollout would be written for nothing.
        writers = writers_of(self.policy, self.teacher_text_share)
        for weight in weights:
            if self.rolls_out and not any(weight.trains_on(writer) for writer in writers):
                raise UserError(
                    f"weight {WEIGHT.name_of(type(weight))} is {weight}, but here rollouts are written by "
                    f"{' and '.join(writers)}, so no token of them trains; set its weight of {' or '.join(writers)} above 0"
                )


def writers_of(policy: Policy, teacher_text_share: float) -> list[str]:
    """Who writes rollouts: "student", "teacher" or both."""
    of_policy = policy.writers if teacher_text_share < 1 else ()
    return sorted({*of_policy, *(["teacher"] if teacher_text_share else [])})


def check_writing(plan: Plan, *, in_vllm: bool, steps_at_once: int) -> None:
    """Raise UserError where the loss needs fresher text than is written, or more of the teacher than is kept or vLLM hands over."""
    objective, signal = plan.objective, plan.teacher_signal
    if objective.long_term_weight and steps_at_once > 1:
        raise UserError(
            f"long_term_weight is {objective.long_term_weight}, which needs text of the student as it is now; set rollout_steps "
            f"to 1"
        )
    if in_vllm and plan.trains_data_alone:
        raise UserError("vllm is set, but no model writes text here; leave it out")
    if in_vllm and plan.rolls_out and signal is None and objective.divergence is not None:
        raise UserError("vllm hands over the teacher's likeliest ids alone; set teacher_signal: {top_k: 64}")
    if signal is None:
        return
    if objective.divergence is None:
        raise UserError("teacher_signal is set, but nothing is compared with the teacher; leave it out")
    if objective.loss_temperature != 1:
        raise UserError(
            f"loss_temperature is {objective.loss_temperature}, but of the teacher only likeliest ids are kept, at temperature 1; "
            f"set it to 1, or leave teacher_signal out"
        )
    outlier_ids = getattr(objective.outlier_divergence, "top_k", 0)
    if outlier_ids > signal.top_k:
        raise UserError(
            f"weight.top_k is {outlier_ids}, but of the teacher only the {signal.top_k} likeliest ids are kept; set it to "
            f"{signal.top_k} at most, or raise teacher_signal.top_k"
        )
    if objective.target.needs_start:
        raise UserError("the target is made of whole distributions; leave teacher_signal out")
