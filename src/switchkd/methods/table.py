"""The method table: who writes the training text, what is compared, and how much of the text comes from where.

A method is data. A new one is a row of `METHODS`, or a `Method` of another package (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from switchkd.distributions.divergences import (
    REVERSE_KL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from switchkd.loss.release import Release
from switchkd.loss.targets import OF_TEACHER, Target
from switchkd.loss.weight import Weight
from switchkd.loss.weights import Importance, Prefix, Trust
from switchkd.methods.text import LengthGrowth, ReplayedPrefix, Rewrite
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Student
from switchkd.rollout.policies import AdaSwitch, Early, Late, Switch
from switchkd.settings.components import Registry, settings_of
from switchkd.settings.paper import DEFAULT_SHARE


@dataclass(frozen=True)
class Method:
    """A row of the table. Every field from `policy` to `rewrite` is also a setting of a run, which replaces it.

    Of the training sequences, `student_share` (0 to 1) are rolled out by `policy`; the rest is the data set's text, or the
    teacher's, written once before the first step, where `teacher_writes_data`. The loss is `divergence` (None: no teacher in
    the loss) between the student and the `target`, plus `cross_entropy_weight` times the cross-entropy, counted by the product
    of the weights. The threshold of the row's Switch is calibrated, unless the run gives one, where `finds_threshold`.
    SwitchConfig describes the other settings. `start` names the student that the source starts from; a run trains it in an
    earlier stage, as in recipes/.
    """

    summary: str
    source: str = "-"
    departs: str = "-"
    policy: Policy = Student()
    divergence: Divergence | None = None
    teacher_text_divergence: Divergence | None = None
    cross_entropy_weight: float = 0.0
    long_term_weight: float = 0.0
    student_share: float = 0.0
    teacher_text_share: float = 0.0
    share_rise: float = 0.0
    replay_capacity: int = 0
    replay_share: float = 0.5
    weight: tuple[Weight, ...] = ()
    target: Target = OF_TEACHER
    start_weight: float = 0.0
    start_divergence: Divergence = REVERSE_KL
    replayed_prefix: ReplayedPrefix | None = None
    length_growth: LengthGrowth | None = None
    rewrite: Rewrite | None = None
    teacher_writes_data: bool = False
    finds_threshold: bool = False
    start: Literal["base", "sft"] = "sft"

    @property
    def writer(self) -> str:
        """Who writes the training text, in a word."""
        if self.teacher_writes_data:
            return "Teacher, once"
        if self.rewrite:
            return f"{type(self.policy).__name__}, then Teacher"
        return type(self.policy).__name__ if self.student_share or self.share_rise else "data set"


_OF_THE_ROW_ALONE = ("summary", "source", "departs", "teacher_writes_data", "finds_threshold", "start")
# What a run's settings of the same name replace.
REPLACEABLE = tuple(key for key in settings_of(Method) if key not in _OF_THE_ROW_ALONE)


def _control(policy: Policy, summary: str) -> Method:
    """A control of SWITCH's choice of places: the teacher writes the share that `switch` is calibrated for, wherever that is."""
    source = "a control of SWITCH's choice of places, at the share that `switch` is calibrated for"
    return Method(f"control: {summary}", source, policy=policy, student_share=1.0, divergence=ForwardKL())


METHODS: dict[str, Method] = {
    "sft": Method(
        "supervised fine-tuning: cross-entropy on the data set's responses", cross_entropy_weight=1.0, start="base"
    ),
    "kd": Method(
        "word-level distillation: forward KL to the teacher on the data set's responses",
        source="Hinton et al. 2015, arXiv 1503.02531; Sanh et al. 2019, arXiv 1910.01108",
        departs="no cross-entropy mixed in; MiniLLM's baseline mixes 0.5 (set cross_entropy_weight)",
        divergence=ForwardKL(),
        start="base",
    ),
    "gkd": Method(
        "on-policy distillation: the student writes student_share of the sequences, the data set the rest",
        source="Agarwal et al. 2024, arXiv 2306.13649",
        departs="who writes is decided for each sequence, not for each batch; on-policy (student_share 1) by default",
        student_share=1.0,
        divergence=JensenShannon(teacher_weight=0.1),
    ),
    "switch": Method(
        "SWITCH: the student writes, and the teacher wherever the two disagree by more than a decaying threshold",
        source="Koo et al. 2025, arXiv 2410.19503",
        departs="the paper's loss could not be read at the source: forward KL here (set divergence)",
        policy=Switch(),
        finds_threshold=True,
        student_share=1.0,
        divergence=ForwardKL(),
    ),
    "seqkd": Method(
        "sequence-level distillation: cross-entropy on responses that the teacher writes once, before the first step",
        source="Kim and Rush 2016, arXiv 1606.07947",
        departs="the teacher's text is sampled with the run's temperature, not the mode of a beam search",
        cross_entropy_weight=1.0,
        teacher_writes_data=True,
        start="base",
    ),
    "imitkd": Method(
        "imitation learning: forward KL to the teacher on text that the student writes",
        source="Lin et al. 2020, arXiv 2009.07253",
        departs="every sequence is the student's from the first step on: no schedule that mixes in the data set's text",
        student_share=1.0,
        divergence=ForwardKL(),
    ),
    "skd": Method(
        "speculative distillation: the student's token stays if it is among the teacher's keep_top_k most likely",
        source="Xu et al. 2025, arXiv 2410.11325",
        departs="the teacher's ranks are of the distribution after the run's temperature, top-k and top-p",
        policy=Interleave(),
        student_share=1.0,
        divergence=ForwardKL(),
    ),
    "adaswitch": Method(
        "AdaSwitch: the student writes until the divergence jumps, the teacher from there to the end",
        source="Peng et al. 2025, arXiv 2510.07842",
        departs="the divergence compared is Jensen-Shannon's; factor and window could not be read at the source: ours",
        policy=AdaSwitch(),
        student_share=1.0,
        divergence=ForwardKL(),
    ),
    "random": _control(
        Mix(DEFAULT_SHARE),
        "each token is the teacher's with probability teacher_share, whether the two disagree or not",
    ),
    "early": _control(
        Early(DEFAULT_SHARE), "the teacher writes first, teacher_share of max_new_tokens, then the student"
    ),
    "late": _control(
        Late(DEFAULT_SHARE), "the student writes first, and the teacher the last teacher_share of max_new_tokens"
    ),
    "distillm": Method(
        "DistiLLM: skewed forward KL; the student's share rises when the dev loss worsens; old rollouts are replayed",
        source="Ko et al. 2024, arXiv 2402.03898",
        departs="who writes is decided for each sequence; the replayed share is constant and does not rise over the run",
        divergence=SkewedForwardKL(),
        share_rise=0.1,
        replay_capacity=1000,
    ),
    "distillm2": Method(
        "DistiLLM-2: skewed forward KL on the teacher's own text, skewed reverse KL on the student's, half each",
        source="Ko et al. 2025, arXiv 2503.07067",
        departs="a prompt gets one of the two texts at a step, not both; written at each step, not once an epoch; no "
        "curriculum on the skew",
        student_share=1.0,
        divergence=SkewedReverseKL(),
        teacher_text_share=0.5,
        teacher_text_divergence=SkewedForwardKL(),
    ),
    "minillm": Method(
        "MiniLLM: reverse KL of whole sequences by policy gradient, on text in which the teacher writes some tokens",
        source="Gu et al. 2024, arXiv 2306.08543, equations 5 to 8",
        departs="single-step term, length-normalized long-term term and per-token importance weights are in; the clipping "
        "is not, since each rollout is used for one step, nor the loss on pre-training text; mean over tokens",
        policy=Mix(0.2),
        student_share=1.0,
        divergence=ReverseKL(),
        long_term_weight=1.0,
    ),
    "trb": Method(
        "trust-region blending: the law nearest to the teacher within a budget of the student writes, at first",
        source="arXiv 2605.31159",
        departs="no default could be read: budget and anneal_steps are one cell of the paper's sweep; reverse KL over the "
        "whole vocabulary, not over the student's top 16",
        policy=TrustRegionBlend(budget=0.02, anneal_steps=50),
        student_share=1.0,
        divergence=ReverseKL(),
    ),
    "iw_opd": Method(
        "IW-OPD: on-policy, and a token counts the less, the further the text before it has left the teacher",
        source="arXiv 2606.22600; TRL 1.16, experimental/iw_opd",
        departs="reverse KL over the whole vocabulary, where both sources take the sampled token's policy gradient",
        student_share=1.0,
        divergence=ReverseKL(),
        weight=(Importance(),),
    ),
    "prefix": Method(
        "prefix distillation: on-policy, and rollouts end after the first part of max_new_tokens",
        source="arXiv 2602.15260 (Findings of ACL 2026)",
        departs="the paper's length could not be read: 30%, which is what IW-OPD reports to be enough; it does not grow",
        student_share=1.0,
        divergence=ReverseKL(),
        weight=(Prefix(share=0.3),),
    ),
    "tropd": Method(
        "TrOPD: on-policy reverse KL where the teacher trusts the student's token, forward KL over its top 64 elsewhere",
        source="arXiv 2606.01249",
        departs="the mean over the paper's coin; reverse KL over the whole vocabulary, not of the sampled token; no teacher "
        "prefixes unless replayed_prefix is set, since prompts are to suffice",
        student_share=1.0,
        divergence=ReverseKL(),
        weight=(Trust(),),
    ),
    "release": Method(
        "release: on-policy up to where the teacher no longer tells the student's candidates apart",
        source="arXiv 2605.13643",
        departs="only the abstract could be read: margin, criterion and defaults are ours; segments of tokens, not sentences",
        student_share=1.0,
        divergence=ReverseKL(),
        weight=(Release(),),
    ),
    "trd": Method(
        "TRD: the teacher rewrites what the student wrote, and that is trained on under the original prompt",
        source="arXiv 2606.08432; github.com/louieworth/trd",
        departs="attempts are rewritten at each step, not once; the teacher scores without seeing the attempt; the "
        "template is ours",
        student_share=1.0,
        divergence=ForwardKL(),
        rewrite=Rewrite(),
    ),
    "stable_opd": Method(
        "StableOPD: on-policy, half of the sequences the data set's, and kept near the start model",
        source="arXiv 2604.08527",
        departs="half of the prompts get the data set's text, not each beside its rollout; it is compared with the teacher like "
        "the rollouts, where the paper takes its cross-entropy; the weight of 0.01 is from another code base",
        student_share=0.5,
        divergence=ReverseKL(),
        start_weight=0.01,
    ),
    "reopd": Method(
        "ReOPD: on-policy from prefixes of the data set's responses, long ones being rare",
        source="arXiv 2607.04763; github.com/BaohaoLiao/ReOPD",
        departs="the paper's prefixes are turns of an agent's run, drawn once; here eighths of a response, drawn at each step",
        student_share=1.0,
        divergence=ReverseKL(),
        replayed_prefix=ReplayedPrefix(),
    ),
}

METHOD = Registry("method", "switchkd.methods", Method, METHODS)
