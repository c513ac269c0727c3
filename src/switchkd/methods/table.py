"""A method is data: who writes the training text, what is compared, and how much of the text comes from where.

A new method is a row of `METHODS`. Every field of a row can be replaced by a setting of the run; `plan_of` in plan.py does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from switchkd.errors import UserError
from switchkd.rollout.policies import AdaSwitch, Early, Interleave, Late, Mix, Policy, Student, Switch

# Settings of a run that replace a value of its method's row, with the value where neither says anything.
ROW_SETTINGS: dict[str, Any] = {
    "teacher_text_share": 0.0,
    "teacher_text_divergence": None,
    "share_rise": 0.0,
    "replay_capacity": 0,
    "replay_share": 0.5,
    "long_term_weight": 0.0,
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    `policy` writes the rollouts; `rollout_share` is the share of training sequences that are rolled out, the rest is the data
    set's text, or the teacher's, written once, where `teacher_writes_data`; `divergence` (None: no teacher in the loss), with
    its `divergence_settings` where they are not the divergence's own defaults, and `cross_entropy_weight` are the loss;
    `settings` are the row's values of `ROW_SETTINGS` and of the policy's settings. `start` says from which student the
    source starts, base or sft: a run does it in a stage before, as in recipes/.
    """

    summary: str
    source: str
    departs: str
    rollout_share: float
    divergence: str | None
    policy: type[Policy] = Student
    cross_entropy_weight: float = 0.0
    divergence_settings: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher_writes_data: bool = False
    start: str = "sft"

    def value_of(self, setting: str) -> Any:
        """The row's value of one of `ROW_SETTINGS`."""
        return self.settings.get(setting, ROW_SETTINGS[setting])

    @property
    def policy_settings(self) -> tuple[str, ...]:
        """The run's settings that the policy takes: its fields, which have their names."""
        return tuple(each.name for each in fields(self.policy))  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "sft": Method(
        summary="supervised fine-tuning: cross-entropy on the data set's responses",
        source="-",
        departs="-",
        rollout_share=0.0,
        divergence=None,
        cross_entropy_weight=1.0,
        start="base",
    ),
    "kd": Method(
        summary="word-level distillation: forward KL to the teacher on the data set's responses",
        source="Hinton et al. 2015, arXiv 1503.02531; Sanh et al. 2019, arXiv 1910.01108",
        departs="no cross-entropy mixed in; MiniLLM's baseline mixes 0.5 (set cross_entropy_weight)",
        rollout_share=0.0,
        divergence="forward_kl",
        start="base",
    ),
    "gkd": Method(
        summary="on-policy distillation: the student writes student_share of the sequences, the data set the rest",
        source="Agarwal et al. 2024, arXiv 2306.13649",
        departs="who writes is decided for each sequence, not for each batch; on-policy (student_share 1) by default",
        rollout_share=1.0,
        divergence="jensen_shannon",
        divergence_settings={"teacher_weight": 0.1},
    ),
    "switch": Method(
        summary="SWITCH: the student writes, the teacher wherever the two disagree by more than a decaying threshold",
        source="Koo et al. 2025, arXiv 2410.19503",
        departs="the paper's loss could not be read at the source: forward KL here (set divergence)",
        policy=Switch,
        rollout_share=1.0,
        divergence="forward_kl",
    ),
    "seqkd": Method(
        summary="sequence-level distillation: cross-entropy on responses that the teacher writes once, before the first step",
        source="Kim and Rush 2016, arXiv 1606.07947",
        departs="the teacher's text is sampled with the run's temperature, not the mode of a beam search",
        rollout_share=0.0,
        divergence=None,
        cross_entropy_weight=1.0,
        teacher_writes_data=True,
        start="base",
    ),
    "imitkd": Method(
        summary="imitation learning: forward KL to the teacher on text that the student writes",
        source="Lin et al. 2020, arXiv 2009.07253",
        departs="every sequence is the student's from the first step on: no schedule that mixes in the data set's text",
        rollout_share=1.0,
        divergence="forward_kl",
    ),
    "skd": Method(
        summary="speculative distillation: the student's token stays where the teacher ranks it among its keep_top_k best",
        source="Xu et al. 2025, arXiv 2410.11325",
        departs="the teacher's ranks are of the distribution after the run's temperature, top-k and top-p",
        policy=Interleave,
        rollout_share=1.0,
        divergence="forward_kl",
    ),
    "adaswitch": Method(
        summary="AdaSwitch: the student writes until the divergence jumps, the teacher from there to the end",
        source="Peng et al. 2025, arXiv 2510.07842",
        departs="the divergence compared is Jensen-Shannon's; factor and window could not be read at the source: ours",
        policy=AdaSwitch,
        rollout_share=1.0,
        divergence="forward_kl",
    ),
    "random": Method(
        summary="control: each token is the teacher's with probability teacher_share, wherever the two disagree or not",
        source="a control of SWITCH's choice of places; its share is the best of arXiv 2410.19503",
        departs="-",
        policy=Mix,
        rollout_share=1.0,
        divergence="forward_kl",
        settings={"teacher_share": 0.53},
    ),
    "early": Method(
        summary="control: the teacher writes first, teacher_share of max_new_tokens, then the student",
        source="a control of SWITCH's choice of places; its share is the best of arXiv 2410.19503",
        departs="-",
        policy=Early,
        rollout_share=1.0,
        divergence="forward_kl",
        settings={"teacher_share": 0.53},
    ),
    "late": Method(
        summary="control: the student writes first, the teacher the last teacher_share of max_new_tokens",
        source="a control of SWITCH's choice of places; its share is the best of arXiv 2410.19503",
        departs="-",
        policy=Late,
        rollout_share=1.0,
        divergence="forward_kl",
        settings={"teacher_share": 0.53},
    ),
    "distillm": Method(
        summary="DistiLLM: skewed forward KL; the student's share rises when the dev loss worsens; old rollouts are replayed",
        source="Ko et al. 2024, arXiv 2402.03898",
        departs="who writes is decided for each sequence; the replayed share is constant, not rising over the run",
        rollout_share=0.0,
        divergence="skewed_forward_kl",
        settings={"share_rise": 0.1, "replay_capacity": 1000},
    ),
    "distillm2": Method(
        summary="DistiLLM-2: skewed forward KL on the teacher's own text, skewed reverse KL on the student's, half each",
        source="Ko et al. 2025, arXiv 2503.07067",
        departs="a prompt gets one of the two texts at a step, not both; written at each step, not once an epoch; no "
        "curriculum on the skew",
        rollout_share=1.0,
        divergence="skewed_reverse_kl",
        settings={"teacher_text_share": 0.5, "teacher_text_divergence": "skewed_forward_kl"},
    ),
    "minillm": Method(
        summary="MiniLLM: reverse KL of whole sequences by policy gradient, on text in which the teacher writes some tokens",
        source="Gu et al. 2024, arXiv 2306.08543, equations 5 to 8",
        departs="single-step term, length-normalised long-term term and per-token importance weights are in; the clipping "
        "is not, since each rollout is used for one step, nor the loss on pre-training text; mean over tokens",
        policy=Mix,
        rollout_share=1.0,
        divergence="reverse_kl",
        settings={"teacher_share": 0.2, "long_term_weight": 1.0},
    ),
}


def method_named(name: str) -> Method:
    """The row of that exact name; raises UserError that lists the choices."""
    if name not in METHODS:
        raise UserError(f"there is no method named {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
