"""A method with the run's settings filled in: what the trainer carries out; all that does not fit is refused here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.distributions.divergences import DIVERGENCE_SETTINGS, DIVERGENCES, divergence_named
from switchkd.errors import UserError
from switchkd.loss.objective import DivergenceFunction, Objective
from switchkd.methods.table import METHODS, ROW_SETTINGS, Method, method_named
from switchkd.rollout.policies import Policy, Switch

if TYPE_CHECKING:
    from switchkd.methods.config import SwitchConfig

# The threshold that a run finds itself.
AUTO = "auto"
# Settings that one policy alone takes. SWITCH's pass by under the other methods, so that the stages of a run can share them.
POLICY_SETTINGS = tuple(
    dict.fromkeys(key for row in METHODS.values() if row.policy is not Switch for key in row.policy_settings)
)


@dataclass(frozen=True)
class AutoThreshold:
    """`threshold: auto`: calibrate to a teacher share on the first `prompts` prompts, again every `every` steps (0: once)."""

    teacher_share: float = 0.53
    prompts: int = 64
    every: int = 0


@dataclass(frozen=True)
class Plan:
    """A method with the run's settings filled in: what the trainer carries out.

    Of the sequences, `rollout_share` are rolled out (with `share_rise`, at the start); of these the teacher alone writes
    `teacher_text_share`, and `policy` the others. `teacher_text` is the file of the teacher's text that takes the data set's
    place. `auto_threshold`: the policy is a Switch, whose threshold is to be calibrated (training/auto_threshold.py).
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

    @property
    def rolls_out(self) -> bool:
        """Whether any sequence is ever rolled out."""
        return self.rollout_share > 0 or self.share_rise > 0

    @property
    def needs_response(self) -> bool:
        """Whether the data set has to give responses: where its text is trained on."""
        return self.rollout_share < 1 and self.teacher_text is None

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to be loaded, for the text or for the loss."""
        writes = self.rolls_out and (self.policy.needs_teacher or self.teacher_text_share > 0)
        return self.objective.divergence is not None or self.teacher_text is not None or writes


def plan_of(config: SwitchConfig) -> Plan:
    """The plan of a run: its method's row, each field replaced where the configuration sets it.

    Raises UserError for an unknown method or divergence, for settings out of range, and for those that nothing would read,
    before any model is loaded.
    """
    method = method_named(config.method)
    row = {key: method.value_of(key) if (given := getattr(config, key)) is None else given for key in ROW_SETTINGS}
    rollout_share = _rollout_share(config, method)
    policy = _policy_of(config, method)
    divergence, of_teacher_text = _divergences_of(config, method, row["teacher_text_divergence"])
    weight = method.cross_entropy_weight if config.cross_entropy_weight is None else config.cross_entropy_weight
    if divergence is None and not weight:
        raise UserError(
            f"cross_entropy_weight is {weight}, and method {config.method!r} has no divergence, so there is nothing to "
            f"minimise; set cross_entropy_weight or divergence"
        )
    _check_loss(config, weight)
    plan = Plan(
        policy=policy,
        rollout_share=rollout_share,
        objective=Objective(
            divergence,
            cross_entropy_weight=weight,
            loss_temperature=config.loss_temperature,
            train_on=config.train_on,
            student_token_weight=config.student_token_weight,
            teacher_token_weight=config.teacher_token_weight,
            teacher_text_divergence=of_teacher_text,
            long_term_weight=row["long_term_weight"],
        ),
        auto_threshold=AutoThreshold(config.target_teacher_share, config.calibration_prompts, config.recalibrate_every)
        if config.threshold == AUTO and isinstance(policy, Switch)
        else None,
        teacher_text=_teacher_text(config, method),
        **{key: row[key] for key in ("teacher_text_share", "share_rise", "replay_capacity", "replay_share")},
    )
    _check_engine(config)
    _check_calibration(config)
    _check_text(config, plan)
    _check_long_term(config, plan)
    _check_token_weights(config, plan)
    return plan


def _rollout_share(config: SwitchConfig, method: Method) -> float:
    share = method.rollout_share if config.student_share is None else config.student_share
    if not 0 <= share <= 1:
        raise UserError(
            f"student_share is {config.student_share}; it is the share of sequences rolled out, from 0 to 1"
        )
    if config.student_share is not None and method.rollout_share == 0 and not method.value_of("share_rise"):
        raise UserError(
            f"student_share is {config.student_share}, but method {config.method!r} trains on data only; use gkd"
        )
    return share


def _policy_of(config: SwitchConfig, method: Method) -> Policy:
    """The method's policy with its settings: the run's, else the row's, else the policy's own."""
    takes = method.policy_settings
    for key in POLICY_SETTINGS:
        if key not in takes and (given := getattr(config, key)) is not None:
            raise UserError(f"{key} is {given}, but method {config.method!r} does not read it; leave {key} out")
    values: dict[str, Any] = {}
    for key in takes:
        value = method.settings.get(key) if (given := getattr(config, key)) is None else given
        if value is not None:
            values[key] = value
    if isinstance(threshold := values.get("threshold"), str):
        if threshold != AUTO:
            raise UserError(f"threshold is {threshold!r}; it has to be a number of nats, or {AUTO}")
        # Where it is to be found, the search starts from the default.
        del values["threshold"]
    return method.policy(**values)


def _divergences_of(
    config: SwitchConfig, method: Method, of_teacher_text: str | None
) -> tuple[DivergenceFunction | None, DivergenceFunction | None]:
    """The divergence, and the one at the tokens that the teacher wrote where it is another."""
    name = config.divergence or method.divergence
    given = {key: value for key in DIVERGENCE_SETTINGS if (value := getattr(config, key)) is not None}
    if name is None:
        unread = {"teacher_text_divergence": of_teacher_text} if of_teacher_text else {}
        for key, value in {**given, **unread}.items():
            raise UserError(f"{key} is {value}, but method {config.method!r} has no divergence; leave {key} out")
        return None, None
    # The row's own settings belong to the row's own divergence.
    of_the_row = method.divergence_settings if name == method.divergence else {}
    if of_teacher_text is None:
        return divergence_named(name, **{**of_the_row, **given}), None
    # Each of the two takes its own settings, and the first complains of what neither takes.
    divergence_named(of_teacher_text)
    second = DIVERGENCES[of_teacher_text].settings
    only_second = {key: value for key, value in given.items() if key in second}
    first = {key: value for key, value in given.items() if key in DIVERGENCES[name].settings or key not in second}
    return divergence_named(name, **{**of_the_row, **first}), divergence_named(of_teacher_text, **only_second)


def _teacher_text(config: SwitchConfig, method: Method) -> Path | None:
    if method.teacher_writes_data:
        return Path(config.teacher_text or Path(str(config.output_dir)) / "teacher_text.jsonl")
    if config.teacher_text is not None:
        raise UserError(
            f"teacher_text is {config.teacher_text!r}, but method {config.method!r} does not read it; leave it out"
        )
    return None


def _check_loss(config: SwitchConfig, weight: float) -> None:
    if not weight >= 0:
        raise UserError(f"cross_entropy_weight is {weight}; it has to be 0 or more")
    if not config.loss_temperature > 0:
        raise UserError(f"loss_temperature is {config.loss_temperature}; it has to be positive")


def _check_engine(config: SwitchConfig) -> None:
    if config.block_size != "auto" and (not isinstance(config.block_size, int) or config.block_size < 1):
        raise UserError(f"block_size is {config.block_size!r}; give 1 or more tokens, or auto")
    try:
        config.sampling  # noqa: B018 - checks its values
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_text(config: SwitchConfig, plan: Plan) -> None:
    """Raises UserError for shares and sizes that are out of range or act on nothing."""
    shares = {key: getattr(plan, key) for key in ("teacher_text_share", "share_rise", "replay_share")}
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key} is {value}; it is a share of sequences, from 0 to 1")
    if not plan.replay_capacity >= 0:
        raise UserError(f"replay_capacity is {plan.replay_capacity}; give a number of rollouts, or 0 for none")
    of_rollouts = (
        "teacher_text_share",
        "replay_capacity",
        "replay_share",
        "long_term_weight",
        "teacher_text_divergence",
    )
    for key in of_rollouts:
        if getattr(config, key) and not plan.rolls_out:
            raise UserError(
                f"{key} is {getattr(config, key)}, but method {config.method!r} has no rollouts here; leave it out"
            )
    if config.replay_share is not None and not plan.replay_capacity:
        raise UserError(
            f"replay_share is {config.replay_share}, but replay_capacity is 0; set it, or leave the share out"
        )


def check_evaluation(plan: Plan, config: SwitchConfig, *, has_data: bool) -> None:
    """Raises UserError where the student's share is to follow an evaluation that never comes."""
    if plan.share_rise and (config.eval_strategy == "no" or not has_data):
        raise UserError(
            f"the student's share rises by share_rise {plan.share_rise} where the loss on evaluation data worsens, but there "
            f"is no evaluation; set eval_strategy and eval_data, or share_rise to 0 and student_share"
        )


def _check_long_term(config: SwitchConfig, plan: Plan) -> None:
    """Raises UserError where the long-term term's importance weights are not known."""
    weight = plan.objective.long_term_weight
    if not weight >= 0:
        raise UserError(f"long_term_weight is {weight}; it has to be 0 or more")
    if not weight:
        return
    if plan.policy.draws_anew:
        raise UserError(
            f"long_term_weight is {weight}, but the probability of what {type(plan.policy).__name__} writes is not known; "
            f"set it to 0"
        )
    if (config.temperature, config.top_p, config.top_k) != (1, 1, 0):
        raise UserError(
            f"long_term_weight is {weight}, which needs text drawn from the models' own distributions; set temperature and "
            f"top_p to 1 and top_k to 0"
        )
    if plan.replay_capacity:
        raise UserError(
            f"long_term_weight is {weight}, which needs text of the student as it is now; set replay_capacity to 0"
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


def _check_token_weights(config: SwitchConfig, plan: Plan) -> None:
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
    given = (
        f"train_on is {config.train_on!r}, student_token_weight {weights['student']} and teacher_token_weight "
        f"{weights['teacher']}"
    )
    if not plan.rolls_out:
        raise UserError(f"{given}: these act on rollouts, but method {config.method!r} has none here; leave them out")
    # Where rollouts are a part of the text only, too: each would cost its writing and count for nothing.
    of_policy = plan.policy.writers if plan.teacher_text_share < 1 else ()
    writers = sorted({*of_policy, *(["teacher"] if plan.teacher_text_share else [])})
    if all(config.train_on not in ("all", writer) or weights[writer] == 0 for writer in writers):
        raise UserError(
            f"{given}, but here rollouts are written by {' and '.join(writers)}, so that no token of them trains; set "
            f"train_on to all, and the weight of {' or '.join(writers)} above 0"
        )
