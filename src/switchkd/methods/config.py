"""The settings of a training run. Every field carries its sentence; the command line and the docs read it from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import TrainingArguments

from switchkd.analysis.calibration import PAPER_SHARE
from switchkd.loss.objective import TrainOn
from switchkd.records import Sampling
from switchkd.rollout.policies import DecayName


@dataclass
class SwitchConfig(TrainingArguments):
    """`transformers.TrainingArguments` with what distillation adds.

    Differences in defaults: progress is logged every step, no reports are sent anywhere unless asked (`report_to`),
    precision is that of the model, and the learning rate is 1e-5.
    """

    method: str = field(
        default="switch", metadata={"help": "A row of the method table: `switchkd methods` lists them."}
    )
    divergence: str | None = field(default=None, metadata={"help": "Replaces the method's divergence."})
    teacher_weight: float | None = field(
        default=None,
        metadata={"help": "The teacher's weight in the mixture of jensen_shannon or skewed_forward_kl, inside 0..1."},
    )
    student_weight: float | None = field(
        default=None, metadata={"help": "The student's weight in the mixture of skewed_reverse_kl, inside 0..1."}
    )
    forward_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the forward KL in symmetric_kl, inside 0..1; the reverse's is the rest."},
    )
    head_mass: float | None = field(
        default=None, metadata={"help": "The teacher's probability in the head of adaptive_kl, inside 0..1."}
    )
    teacher_power: float | None = field(
        default=None, metadata={"help": "The power of the teacher's probability in alpha_beta, above 0."}
    )
    student_power: float | None = field(
        default=None, metadata={"help": "The power of the student's probability in alpha_beta, above 0."}
    )
    teacher_text_divergence: str | None = field(
        default=None,
        metadata={"help": "The divergence at tokens of rollouts that the teacher wrote, where it is another one."},
    )
    long_term_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of MiniLLM's policy-gradient term for what a token does to the later ones; 0 is none."
        },
    )
    cross_entropy_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of -log p_student(token), added to the divergence; replaces the method's."},
    )
    train_on: TrainOn = field(
        default="all",
        metadata={"help": "Whose tokens of a rollout are trained on: all, student, teacher. Data text always is."},
    )
    student_token_weight: float = field(
        default=1.0, metadata={"help": "What the loss of a rollout's tokens that the student wrote is multiplied by."}
    )
    teacher_token_weight: float = field(
        default=1.0, metadata={"help": "What the loss of a rollout's tokens that the teacher wrote is multiplied by."}
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the loss; has no effect on sampling."}
    )
    student_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of sequences rolled out (GKD's lambda); the rest is the data set's text. 1: prompts suffice."
        },
    )
    share_rise: float | None = field(
        default=None,
        metadata={
            "help": "DistiLLM: student_share rises by this where the evaluation loss worsens by 0.1; 0 is never."
        },
    )
    teacher_text_share: float | None = field(
        default=None, metadata={"help": "Of the sequences rolled out, the share that the teacher writes alone."}
    )
    teacher_text: str | None = field(
        default=None,
        metadata={"help": "seqkd: the file of the teacher's text; by default teacher_text.jsonl in output_dir."},
    )
    replay_capacity: int | None = field(
        default=None, metadata={"help": "Rollouts kept to be trained on again, the oldest leave first; 0 is none."}
    )
    replay_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the student's sequences that are drawn from the kept ones, once these are complete."
        },
    )
    teacher_share: float | None = field(
        default=None, metadata={"help": "minillm, random, early, late: the share of tokens that the teacher writes."}
    )
    keep_top_k: int | None = field(
        default=None, metadata={"help": "skd: the student's token stays if it is among the teacher's best so many."}
    )
    factor: float | None = field(
        default=None, metadata={"help": "adaswitch: the teacher takes over above this multiple of the mean divergence."}
    )
    window: int | None = field(
        default=None, metadata={"help": "adaswitch: the mean is over so many divergences before the token."}
    )
    threshold: float | str = field(
        default=0.3,
        metadata={
            "help": "SWITCH: tau_0 in nats, 0 to 0.693; the teacher writes above it. Or auto: target_teacher_share."
        },
    )
    target_teacher_share: float = field(
        default=PAPER_SHARE,
        metadata={"help": "SWITCH, threshold auto: the share of tokens that the teacher is to write, inside 0..1."},
    )
    calibration_prompts: int = field(
        default=64, metadata={"help": "SWITCH, threshold auto: it is found on so many training prompts, the first."}
    )
    recalibrate_every: int = field(
        default=0, metadata={"help": "SWITCH, threshold auto: find it again every so many steps; 0 never."}
    )
    decay: DecayName = field(default="exponential", metadata={"help": "SWITCH: exponential, linear or constant."})
    decay_rate: float | None = field(default=None, metadata={"help": "SWITCH: the decay per token (lambda)."})
    final_fraction: float | None = field(
        default=None,
        metadata={
            "help": "SWITCH: threshold at the last position / at the first; 0.1 where decay_rate is not set either."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of both models; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of both models' sampling; 1 keeps every token."})
    top_k: int = field(default=0, metadata={"help": "Tokens kept in both models' sampling; 0 keeps every token."})
    max_prompt_tokens: int = field(default=256, metadata={"help": "A row with a longer prompt is a bad row."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "Longest rollout, and where the data set's responses are cut, in tokens."}
    )
    rollout_rows: int = field(
        default=64, metadata={"help": "Rollouts in flight at a time; bounds memory, changes no token."}
    )
    # The size that "auto" picks depends on the clock, and the teacher's kept hidden states in their last bits on the size:
    # with a fixed one, equal runs are equal bit for bit.
    block_size: int | str = field(
        default=4,
        metadata={"help": "Tokens drafted before the teacher is asked; auto is chosen by speed. Changes no token."},
    )
    measure_every: int = field(
        default=10,
        metadata={"help": "Steps between measurements of both models' entropies and their agreement; 0 is never."},
    )
    teacher_offload: str = field(
        default="none",
        metadata={"help": "Where the teacher's weights are between rollouts: none (they stay), cpu or disk."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave bad rows out, and say which, instead of stopping."}
    )

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    # The loader hands over records, not tensors: there is nothing to pin.
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin the data loader's memory."})
    # None first, as in transformers, whose HfArgumentParser fails on a list in the second place.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Where to report; as in transformers."}
    )

    @cached_property
    def plan(self) -> Any:
        """What the trainer carries out."""
        from switchkd.methods.plan import plan_of

        return plan_of(self)

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn."""
        return Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
