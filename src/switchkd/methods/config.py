"""The settings of a training run. Every field carries its sentence; the command line and the docs read it from there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from switchkd.data.examples import AddBos, Rendering, TrainTurns
from switchkd.distributions.divergences import Divergence
from switchkd.errors import UserError
from switchkd.evaluation.measures import scores_named
from switchkd.loss.objective import CrossEntropyOn, Objective
from switchkd.loss.targets import Target
from switchkd.loss.weight import Weight
from switchkd.loss.weights import WEIGHT
from switchkd.methods.device import placement_for
from switchkd.methods.inherited import TransformersSettings, check_inherited, renamed
from switchkd.methods.parts import (
    AUTO,
    COMPONENTS,
    DEFAULTS,
    HEADLINE,
    OF_LOSS,
    OF_TEXT,
    TEACHER_SIGNAL,
    auto_threshold,
    check_not_moved,
    described,
    weights_of,
)
from switchkd.methods.plan import AutoThreshold, Plan, TopK, check_writing
from switchkd.methods.table import METHOD, REPLACEABLE, Method
from switchkd.methods.text import LengthGrowth, ReplayedPrefix, Rewrite
from switchkd.methods.unread import check_read
from switchkd.models.placement import Placement
from switchkd.records import Sampling
from switchkd.rollout.blocks import check_block_size
from switchkd.rollout.graphs import Compile
from switchkd.rollout.law import Policy
from switchkd.rollout.policies import POLICY, DecayName, Switch
from switchkd.settings.components import setting
from switchkd.settings.unknown import foreign_named, unknown_setting

Offload = Literal["none", "cpu", "disk", "shared"]


@dataclass
class SwitchConfig(TransformersSettings):
    """`transformers.TrainingArguments` with what distillation adds.

    A component (`policy`, `divergence`, `teacher_text_divergence`) is an object, a name, or a mapping of `name` and settings;
    a mapping without a name changes the method's own. Where one is left out, the method decides.

    Defaults that differ: progress is logged every step, no reports are sent unless asked for (`report_to`), bf16 follows
    `precision`, two checkpoints are kept, and the learning rate follows what is trained. `placement` is what device and
    precision come to. Raises UserError for settings out of range, and for those that nothing would read.
    """

    # HfArgumentParser takes the second type of a union that has None: the form that a command line can give.
    method: None | str | Method = setting(
        "switch", "A row of the method table (`switchkd methods` lists them), or module:NAME."
    )
    policy: None | str | Policy | dict[str, Any] = setting(None, "Who writes the rollouts: {name: ..., its settings}.")
    divergence: None | str | Divergence | dict[str, Any] = setting(
        None, "What is compared in the loss: {name: ..., its settings}."
    )
    teacher_text_divergence: None | str | Divergence | dict[str, Any] = setting(
        None, "The divergence at tokens of rollouts that the teacher wrote, where it is another."
    )
    threshold: None | float | str | AutoThreshold | dict[str, Any] = setting(
        None,
        "SWITCH: tau_0 in nats, 0 to 0.693; the teacher writes above it. auto, its default: found for a teacher share.",
    )
    decay: DecayName | None = setting(None, "SWITCH: how the threshold falls: exponential, linear or constant.")
    decay_rate: float | None = setting(None, "SWITCH: the threshold's decay per token (lambda).")
    final_fraction: float | None = setting(
        None, "SWITCH: threshold at the last position / at the first; 0.1 where decay_rate is not set either."
    )
    cross_entropy_weight: float | None = setting(None, "Weight of -log p_student(token), added to the divergence.")
    cross_entropy_on: CrossEntropyOn = setting(
        "data", "Whose text the cross-entropy falls on: data, data+teacher (its tokens of rollouts too), all."
    )
    long_term_weight: float | None = setting(
        None, "Weight of MiniLLM's policy-gradient term for what a token does to later ones; 0 is none."
    )
    student_share: float | None = setting(
        None, "Share of sequences rolled out (GKD's lambda); the rest is the data set's text. 1: prompts suffice."
    )
    teacher_text_share: float | None = setting(
        None, "Of the sequences rolled out, the share that the teacher writes alone."
    )
    share_rise: float | None = setting(
        None, "DistiLLM: student_share rises by this when the evaluation loss worsens by 0.1; 0 is never."
    )
    replay_capacity: int | None = setting(None, "Rollouts kept for training again; the oldest leave first. 0 is none.")
    replay_share: float | None = setting(
        None, "Share of the student's sequences drawn from the kept rollouts, once the buffer is full."
    )
    teacher_text: str | None = setting(
        None, "seqkd: the file of the teacher's text; by default teacher_text.jsonl in output_dir."
    )
    weight: None | str | Weight | dict[str, Any] | list[Any] = setting(
        None, "Where the loss counts: {name: ..., its settings}, or a list of such, which multiply."
    )
    target: None | str | Target | dict[str, Any] = setting(
        None, "What stands in the teacher's place in the divergence: {name: ..., its settings}."
    )
    teacher_signal: None | str | TopK | dict[str, Any] = setting(
        None, "What is kept of the teacher for the loss: {top_k: 64}; by default whole distributions."
    )
    start_weight: float | None = setting(None, "Weight of an added divergence to the student's start model; 0 is none.")
    start_divergence: None | str | Divergence | dict[str, Any] = setting(
        None, "The divergence to the start model: {name: ..., its settings}."
    )
    replayed_prefix: None | str | ReplayedPrefix | dict[str, Any] = setting(
        None, "Begin rollouts with a part of a response: {source: data, parts: 8, kappa: 0.6, until: 0, weight: 0}."
    )
    length_growth: None | str | LengthGrowth | dict[str, Any] = setting(
        None, "Let the longest rollout grow over the steps: {start: 16, steps_per_token: 1}."
    )
    rewrite: None | str | Rewrite | dict[str, Any] = setting(
        None, "Let the teacher rewrite each rollout: {template: ...} with {prompt} and {attempt}."
    )
    loss_temperature: float = setting(1.0, "Temperature of both distributions in the loss; has no effect on sampling.")
    temperature: float = setting(1.0, "Sampling temperature of both models; 0 is greedy.")
    top_p: float = setting(1.0, "Nucleus of both models' sampling; 1 keeps every token.")
    top_k: int = setting(0, "Tokens kept in both models' sampling; 0 keeps every token.")
    teacher_column: str = setting("teacher", "With several teachers: the column of the data that names each row's.")
    template_from: str = setting(
        "student", "Whose chat template writes conversations: student, teacher, or the path of a template file."
    )
    chat_template_kwargs: dict[str, Any] | None = setting(
        None, "Keywords of the chat template, such as {enable_thinking: false}; a row's own column wins."
    )
    add_bos: AddBos = setting(
        "auto", "Whether text prompts start with a begin-of-text token: auto (as the tokenizer does), always, never."
    )
    train_turns: TrainTurns = setting(
        "last", "sft, kd: the assistant's turns trained on, last or all. Rollouts continue the last."
    )
    max_prompt_tokens: int = setting(256, "A row with a longer prompt is a bad row.")
    max_new_tokens: int = setting(256, "Longest rollout, and where the data set's responses are cut, in tokens.")
    rollout_rows: int = setting(64, "Rollouts in flight at a time; bounds memory, changes no token.")
    rollout_steps: int = setting(1, "Steps whose rollouts are written at once, by the student as it is at their first.")
    block_size: None | str | int = setting(
        "auto", "Tokens drafted before the teacher is asked; auto goes by what stands of them. Changes no token."
    )
    vllm: None | str | dict[str, Any] = setting(
        None, "Let vLLM write the rollouts: here, or the address of switchkd serve; or {url: ..., cache_gib: 4, ...}."
    )
    compile: Compile = setting("auto", "Whether rollouts run as graphs of the device: true, false, auto (on CUDA).")
    measure_every: int = setting(
        10, "Steps between measurements of both models' entropies and their agreement; 0 is never."
    )
    show_rollouts_every: int = setting(100, "Steps between rollouts shown and kept in rollouts.jsonl; 0 is never.")
    eval_scores: None | str | list[str] = setting(
        None,
        "What the student's answers to eval_data are scored by: rouge_l, exact_match, numeric_match, module:FUNCTION.",
    )
    teacher_offload: Offload = setting(
        "none", "Where the teacher's weights lie: none (on the device), cpu, disk, or shared by the processes."
    )
    max_seconds: float | None = setting(None, "End training after this many seconds of computing; see docs/compare.md.")
    max_generated_tokens: int | None = setting(None, "End training once the models have written this many tokens.")
    skip_bad_rows: bool = setting(False, "Leave bad rows out, and say which, instead of stopping.")
    precision: str = setting(
        "auto", "What is computed in: float32, bf16 (autocast), or auto: bf16 on CUDA, else float32."
    )
    dtype: str | None = setting(None, "Type of the student's weights; by default float32.")
    teacher_dtype: str | None = setting(
        None, "Type of the teacher's weights; by default bfloat16 where bf16 is computed in, else the student's."
    )
    attn_implementation: str | None = setting(
        None, "Attention of both models: sdpa, flash_attention_2, eager, ...; by default transformers chooses."
    )
    model_init_kwargs: dict[str, Any] | None = setting(
        None, "More keywords of from_pretrained for the student: {revision: ..., attn_implementation: ...}."
    )
    teacher_model_init_kwargs: dict[str, Any] | None = setting(
        None, "The same for the teacher: {device_map: auto, quantization_config: ...}."
    )
    bf16: bool | None = setting(None, "As precision: bf16 where true, float32 where false.")  # type: ignore[assignment]

    learning_rate: float | None = setting(  # type: ignore[assignment]
        None,
        "The initial learning rate; by default 2e-4 for an adapter, 1e-5 for a whole model, 1e-3 below 30M parameters.",
    )
    save_total_limit: int | None = setting(2, "Checkpoints kept, the newest ones; null keeps all.")
    logging_steps: float = setting(1, "Log every this many steps.")
    # The loader hands over records, not tensors: nothing of them can be pinned.
    dataloader_pin_memory: bool = setting(False, "Pin the data loader's memory.")
    report_to: None | str | list[str] = setting("none", "Where to report; as in transformers.")

    plan: Plan = field(init=False, repr=False, compare=False)
    placement: Placement = field(init=False, repr=False, compare=False)

    def __new__(cls, *_: Any, **given: Any) -> SwitchConfig:
        """Say what a setting that has moved, or that is another tool's, is here: the constructor would only not know it."""
        for key in given:
            check_not_moved(key)
            if key not in cls.__dataclass_fields__ and foreign_named(key):
                raise unknown_setting(key, "in SwitchConfig", (), ())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Ours first: transformers' checks ask for devices and take seconds.
        self.plan = self._make_plan()
        self._check()
        self.placement = placement_for(self)
        # accelerate wraps the student's forward by these; everything else follows the placement, and the two have to agree.
        self.bf16 = self.placement.autocast_dtype is not None
        self.use_cpu = self.placement.device.type == "cpu"
        renamed(self)
        super().__post_init__()  # type: ignore[no-untyped-call]

    def check_evaluation(self, *, has_data: bool) -> None:
        """Raise UserError where an evaluation is asked for without data, or the student's share waits for one that never comes."""
        strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        if strategy != "no" and not has_data:
            raise UserError(f"eval_strategy is {strategy!r}, but there is no eval_data; set it")
        if self.plan.share_rise and strategy == "no":
            raise UserError(
                f"the student's share rises by share_rise {self.plan.share_rise} when the loss on evaluation data worsens, but "
                f"there is no evaluation; set eval_strategy and eval_data, or share_rise to 0 and student_share"
            )

    @property
    def method_name(self) -> str:
        """The method's name, or the summary of a method of one's own."""
        return self.method.summary if isinstance(self.method, Method) else str(self.method)

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn."""
        return Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def rendering(self) -> Rendering:
        """How rows become text."""
        return Rendering(
            self.chat_template_kwargs or {}, self.add_bos, self.train_turns, teacher_column=self.teacher_column
        )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with components as the mappings that describe them."""
        return {key: described(value) for key, value in super().to_dict().items()}  # type: ignore[no-untyped-call]

    def _make_plan(self) -> Plan:
        row = METHOD.make(self.method or SwitchConfig.method or "")
        auto, policy = self._policy(row)
        given = {key: value for key in REPLACEABLE if (value := getattr(self, key)) is not None} | {"policy": policy}
        for key, registry in COMPONENTS.items():
            if key in given:
                given[key] = registry.make(given[key], default=getattr(row, key) or DEFAULTS.get(key))
        method = replace(row, **given | {"weight": weights_of(self.weight, row.weight, self.max_new_tokens)})
        reads = self._teacher_text(method) is not None
        check_read(vars(self), row, method, name=self.method_name, reads_teacher_text=reads)
        of_loss, of_text = ({key: getattr(method, key) for key in keys} for keys in (OF_LOSS, OF_TEXT))
        objective = Objective(
            method.divergence,
            cross_entropy_on=self.cross_entropy_on,
            loss_temperature=self.loss_temperature,
            weights=method.weight,
            **of_loss,
        )
        text, signal = self._teacher_text(method), None
        if self.teacher_signal is not None:
            signal = TEACHER_SIGNAL.make(self.teacher_signal, default=TopK())
        share, given = method.student_share, {"teacher_text": text, "teacher_signal": signal}
        return Plan(method.policy, share, objective, auto, **given, **of_text)

    def _policy(self, row: Method) -> tuple[AutoThreshold | None, Policy]:
        """What finds the threshold, if it is to be found, and the policy: the run's, else the row's, with the flat settings."""
        policy = row.policy if self.policy is None else POLICY.make(self.policy, default=row.policy)
        flat = {key: value for key in HEADLINE if (value := getattr(self, key)) is not None}
        if not isinstance(policy, Switch):
            return None, policy
        inside = flat if isinstance(self.policy, Policy) else self.policy if isinstance(self.policy, Mapping) else ()
        if twice := [key for key in flat if key in inside]:
            raise UserError(f"{twice[0]} is {flat[twice[0]]}, but the policy brings its own; set it in one place")
        finds = row.finds_threshold if self.policy is None else not isinstance(self.policy, Policy)
        given = flat.pop("threshold", AUTO if finds and "threshold" not in inside else None)
        auto = auto_threshold(given)
        # Without a threshold, the search starts from the default.
        policy = replace(policy, **flat, **({} if auto or given is None else {"threshold": given}))
        if auto is None and policy.threshold > math.log(2):
            raise UserError(
                f"threshold is {policy.threshold}, but the divergence is at most ln 2 = 0.693 nats, so the teacher would not "
                f"write before the threshold has fallen that far; take less, or auto"
            )
        return auto, policy

    def _teacher_text(self, method: Method) -> Path | None:
        if method.teacher_writes_data or (method.replayed_prefix and method.replayed_prefix.source == "teacher"):
            return Path(self.teacher_text or Path(str(self.output_dir)) / "teacher_text.jsonl")
        return None

    def _check(self) -> None:
        """Raise UserError for settings that no component checks."""
        # As text it comes from the parser of transformers.
        self.block_size = int(size) if (size := str(self.block_size)).isdigit() else self.block_size
        check_block_size(self.block_size)
        if self.rendering.train_turns == "all" and not self.plan.trains_data_alone:
            raise UserError(
                f"train_turns is 'all', but method {self.method_name!r} has text written, and that continues the last turn "
                f"of a conversation; leave it out, or take sft or kd"
            )
        if scores_named(self.eval_scores) and self.train_turns == "all":
            raise UserError(
                "eval_scores is set, but with train_turns all an answer may be any turn, and the references are of the last; "
                "leave one of them out"
            )
        sampling, objective = self.sampling, self.plan.objective
        # They read the models' own probabilities; what top-k or top-p excludes would make them infinite.
        if objective.reads_logp and (sampling.temperature, sampling.top_p, sampling.top_k) != (1, 1, 0):
            readers = [WEIGHT.name_of(type(weight)) for weight in objective.weights if weight.reads_logp]
            reader = f"weight {readers[0]}" if readers else f"long_term_weight is {objective.long_term_weight}, which"
            raise UserError(
                f"{reader} needs text drawn from the models' own distributions; set temperature and top_p to 1 and top_k to 0"
            )
        check_writing(self.plan, in_vllm=self.vllm is not None, steps_at_once=self.rollout_steps)
        check_inherited(self)
