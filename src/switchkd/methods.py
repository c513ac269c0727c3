"""A method is data: who writes the training text, what is compared, and how much of the text comes from where.

A new method is a row of `METHODS`. Every field of a row can be replaced by a setting of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from switchkd.divergences import DIVERGENCE_SETTINGS, divergence_named
from switchkd.errors import UserError
from switchkd.objective import DivergenceFunction, Objective
from switchkd.policies import Policy, Student, Switch

if TYPE_CHECKING:
    from switchkd.config import SwitchConfig

# The threshold that a run finds itself.
AUTO = "auto"


def _student(config: SwitchConfig) -> Policy:
    return Student()


def _switch(config: SwitchConfig) -> Policy:
    if isinstance(config.threshold, str) and config.threshold != AUTO:
        raise UserError(f"threshold is {config.threshold!r}; it has to be a number of nats, or {AUTO}")
    return Switch(
        # Where it is to be found, the search starts from the default.
        threshold=Switch.threshold if isinstance(config.threshold, str) else config.threshold,
        decay_rate=config.decay_rate,
        final_fraction=config.final_fraction,
        decay=config.decay,
    )


@dataclass(frozen=True)
class Method:
    """A row of the table.

    `policy` makes the writer of the rollouts; `rollout_share` is the share of training sequences that are rolled out, the
    rest is the data set's text; `divergence` (None: no teacher in the loss), with its `divergence_settings` where they are
    not the divergence's own defaults, and `cross_entropy_weight` are the loss.
    """

    summary: str
    source: str
    departs: str
    policy: Callable[[SwitchConfig], Policy]
    rollout_share: float
    divergence: str | None
    cross_entropy_weight: float = 0.0
    divergence_settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs_teacher(self) -> bool:
        """Whether a run needs a teacher at all."""
        return self.divergence is not None


METHODS: dict[str, Method] = {
    "sft": Method(
        summary="supervised fine-tuning: cross-entropy on the data set's responses",
        source="-",
        departs="-",
        policy=_student,
        rollout_share=0.0,
        divergence=None,
        cross_entropy_weight=1.0,
    ),
    "kd": Method(
        summary="word-level distillation: forward KL to the teacher on the data set's responses",
        source="Hinton et al. 2015, arXiv 1503.02531; Sanh et al. 2019, arXiv 1910.01108",
        departs="no cross-entropy mixed in; MiniLLM's baseline mixes 0.5 (set cross_entropy_weight)",
        policy=_student,
        rollout_share=0.0,
        divergence="forward_kl",
    ),
    "gkd": Method(
        summary="on-policy distillation: the student writes student_share of the sequences, the data set the rest",
        source="Agarwal et al. 2024, arXiv 2306.13649",
        departs="who writes is decided for each sequence, not for each batch; on-policy (student_share 1) by default",
        policy=_student,
        rollout_share=1.0,
        divergence="jensen_shannon",
        divergence_settings={"teacher_weight": 0.1},
    ),
    "switch": Method(
        summary="SWITCH: the student writes, the teacher wherever the two disagree by more than a decaying threshold",
        source="Koo et al. 2025, arXiv 2410.19503",
        departs="the paper's loss could not be read at the source: forward KL here (set divergence)",
        policy=_switch,
        rollout_share=1.0,
        divergence="forward_kl",
    ),
}


@dataclass(frozen=True)
class Plan:
    """A method with the run's settings filled in: what the trainer carries out.

    `finds_threshold`: the policy is a Switch, whose threshold is to be calibrated (auto_threshold.py).
    """

    policy: Policy
    rollout_share: float
    objective: Objective
    finds_threshold: bool = False

    @property
    def needs_response(self) -> bool:
        """Whether the data set has to give responses: where its text is trained on."""
        return self.rollout_share < 1


def method_named(name: str) -> Method:
    """The row of that exact name; raises UserError that lists the choices."""
    if name not in METHODS:
        raise UserError(f"there is no method named {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def _divergence_of(config: SwitchConfig, method: Method) -> DivergenceFunction | None:
    name = config.divergence or method.divergence
    given = {key: value for key in DIVERGENCE_SETTINGS if (value := getattr(config, key)) is not None}
    if name is None:
        for key, value in given.items():
            raise UserError(f"{key} is {value}, but method {config.method!r} has no divergence; leave {key} out")
        return None
    # The row's own settings belong to the row's own divergence.
    of_the_row = method.divergence_settings if name == method.divergence else {}
    return divergence_named(name, **{**of_the_row, **given})


def plan_of(config: SwitchConfig) -> Plan:
    """The plan of a run: its method's row, each field replaced where the configuration sets it.

    Raises UserError for an unknown method or divergence and for settings out of range, before any model is loaded.
    """
    method = method_named(config.method)
    rollout_share = method.rollout_share if config.student_share is None else config.student_share
    if not 0 <= rollout_share <= 1:
        raise UserError(
            f"student_share is {config.student_share}; it is the share of sequences rolled out, from 0 to 1"
        )
    if config.student_share is not None and method.rollout_share == 0:
        raise UserError(
            f"student_share is {config.student_share}, but method {config.method!r} trains on data only; use gkd"
        )
    weight = method.cross_entropy_weight if config.cross_entropy_weight is None else config.cross_entropy_weight
    function = _divergence_of(config, method)
    if function is None and not weight:
        raise UserError(
            f"cross_entropy_weight is {weight}, and method {config.method!r} has no divergence, so there is nothing to "
            f"minimise; set cross_entropy_weight or divergence"
        )
    if config.block_size != "auto" and (not isinstance(config.block_size, int) or config.block_size < 1):
        raise UserError(f"block_size is {config.block_size!r}; give 1 or more tokens, or auto")
    if not weight >= 0:
        raise UserError(f"cross_entropy_weight is {weight}; it has to be 0 or more")
    if not config.loss_temperature > 0:
        raise UserError(f"loss_temperature is {config.loss_temperature}; it has to be positive")
    try:
        config.sampling  # noqa: B018 - checks its values
    except ValueError as error:
        raise UserError(str(error)) from error
    policy = method.policy(config)
    _check_calibration(config)
    _check_token_weights(config, policy, rollout_share)
    objective = Objective(
        function,
        cross_entropy_weight=weight,
        loss_temperature=config.loss_temperature,
        train_on=config.train_on,
        student_token_weight=config.student_token_weight,
        teacher_token_weight=config.teacher_token_weight,
    )
    return Plan(
        policy=policy,
        rollout_share=rollout_share,
        objective=objective,
        finds_threshold=config.threshold == AUTO and isinstance(policy, Switch),
    )


def _check_calibration(config: SwitchConfig) -> None:
    """Raises UserError for settings of the calibration that are out of range or act on nothing."""
    if not 0 < config.target_teacher_share < 1:
        raise UserError(f"target_teacher_share is {config.target_teacher_share}; it has to be above 0 and below 1")
    if config.calibration_prompts < 1:
        raise UserError(f"calibration_prompts is {config.calibration_prompts}; it has to be at least 1")
    if config.recalibrate_every < 0:
        raise UserError(f"recalibrate_every is {config.recalibrate_every}; give a number of steps, or 0 for never")
    if config.recalibrate_every and config.threshold != AUTO:
        raise UserError(
            f"recalibrate_every is {config.recalibrate_every}, but threshold is {config.threshold}: there is nothing to "
            f"find; set threshold to {AUTO}, or leave recalibrate_every out"
        )


def _check_token_weights(config: SwitchConfig, policy: Policy, rollout_share: float) -> None:
    """Raises UserError for weights that are none, that have no effect, or that leave nothing of the rollouts."""
    weights = {"student": config.student_token_weight, "teacher": config.teacher_token_weight}
    if config.train_on not in ("all", *weights):
        raise UserError(f"train_on is {config.train_on!r}; choose one of all, student, teacher")
    for writer, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{writer}_token_weight is {weight}; it has to be 0 or more")
        if weight != 1 and config.train_on not in ("all", writer):
            raise UserError(
                f"{writer}_token_weight is {weight}, but train_on {config.train_on!r} leaves these tokens out"
            )
    if config.train_on == "all" and set(weights.values()) == {1.0}:
        return
    if rollout_share == 0:
        raise UserError(
            f"train_on and the token weights act on rollouts, but method {config.method!r} has none here; leave them out"
        )
    writers = ("student", "teacher") if policy.needs_teacher else ("student",)
    if all(config.train_on not in ("all", writer) or weights[writer] == 0 for writer in writers):
        raise UserError(
            f"train_on {config.train_on!r} with weights of {config.student_token_weight} for the student's tokens and "
            f"{config.teacher_token_weight} for the teacher's leaves nothing of what {' and '.join(writers)} wrote"
        )
