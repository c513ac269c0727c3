"""What a run has spent so far, and where its budget of seconds or tokens ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.records import Rollout, Sampling
from switchkd.rollout.engine import Engine, KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.training.kept_state import kept_state


@dataclass
class Spent:
    """Forwards of each model, of whatever size; tokens that either wrote, and the teacher's among them; seconds of training."""

    student_forwards: int = 0
    teacher_forwards: int = 0
    generated_tokens: int = 0
    teacher_generated_tokens: float = 0.0
    training_seconds: float = 0.0


class Costs(TrainerCallback):
    """Counts what a run spends, and ends it where `max_seconds` or `max_generated_tokens` is used up.

    On a CPU seconds are those that the process computed, all its threads together: a run that is paused, or that shares its core,
    spends no more than one that is alone. Elsewhere they are the clock's. Checkpoints keep all of it.
    """

    def __init__(self, args: SwitchConfig) -> None:
        self.args = args
        self.spent = Spent()
        if self.has_budget and args.world_size > 1:
            raise UserError(
                "max_seconds and max_generated_tokens count in one process, and this run has more; give max_steps instead"
            )
        self.clock = time.process_time if args.device.type == "cpu" else time.perf_counter
        self.read_at = self.clock()

    def counting(self, engine: Engine) -> Engine:
        """The engine, whose forwards and tokens are counted."""
        return _CountingEngine(engine, self.spent)

    def count(self, role: Literal["student", "teacher"]) -> None:
        """Count a forward of a model."""
        name = f"{role}_forwards"
        setattr(self.spent, name, getattr(self.spent, name) + 1)

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """Count the seconds of what a method does before its first step, such as the teacher's writing of all text."""
        began = self.clock()
        try:
            yield
        finally:
            self.spent.training_seconds += self.clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile: an evaluation is no training."""
        began, before = self.clock(), asdict(self.spent)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.spent, name, value)
            self.read_at += self.clock() - began

    @property
    def has_budget(self) -> bool:
        """Whether anything but steps ends the run."""
        return bool(self.args.max_seconds or self.args.max_generated_tokens)

    @property
    def used(self) -> float:
        """The part of the budget that is used up, from 0."""
        limits = (
            (self.spent.training_seconds, self.args.max_seconds),
            (self.spent.generated_tokens, self.args.max_generated_tokens),
        )
        return max((spent / limit for spent, limit in limits if limit), default=0.0)

    def totals(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What all processes have spent, by name, as far as it is known; `gather` stacks over them."""
        spent = asdict(self.spent)
        summed = gather(torch.tensor([[*spent.values()]], dtype=torch.float64)).sum(dim=0).tolist()
        totals = dict(zip(spent, summed, strict=True))
        return {name: type(spent[name])(total) for name, total in totals.items() if not math.isnan(total)}

    def follow(self, scheduler: Any, steps: int) -> None:
        """Let the learning rate's schedule of `steps` run over the budget, if there is one.

        After each step it stands as far along as the larger part that is used up: of the steps, or of the budget.
        """
        if self.has_budget and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [self._following(rate, steps) for rate in scheduler.lr_lambdas]

    def _following(self, rate: Callable[[int], float], steps: int) -> Callable[[int], float]:
        # A function: of any other object, torch would put all attributes into the checkpoint.
        def follows(step: int) -> float:
            return rate(min(steps, max(step, int(self.used * steps))))

        return follows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what was spent before a checkpoint, and start the clock."""
        # A checkpoint's state brings the steps between logs, saves and evaluations that its run began with.
        state.compute_steps(args, state.max_steps)
        if kept := kept_state(state, "costs"):
            for name in asdict(self.spent):
                # A checkpoint of an earlier version counted less: what was spent before it is not known.
                setattr(self.spent, name, kept.get(name, math.nan))
        self.read_at = self.clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the clock, keep the totals, and stop at the budget's end."""
        read_at = self.clock()
        self.spent.training_seconds += read_at - self.read_at
        self.read_at = read_at
        kept_state(state, "costs").update(asdict(self.spent))
        if self.has_budget and self.used >= 1:
            control.should_training_stop = True
            # As transformers does at the last of max_steps: with a larger budget the run goes on from here.
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS


class _CountingEngine:
    """An engine that adds to `spent` what each of its calls did."""

    def __init__(self, engine: Engine, spent: Spent) -> None:
        self.engine = engine
        self.spent = spent

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        rollouts = self.engine.generate(
            prompts,
            policy=policy,
            sampling=sampling,
            seed=seed,
            keep_teacher=keep_teacher,
            on_progress=on_progress,
        )
        self.spent.generated_tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        self.spent.teacher_generated_tokens += sum(rollout.teacher_tokens for rollout in rollouts)
        # Not every engine counts its forwards.
        if (metrics := getattr(self.engine, "metrics", None)) is not None:
            self.spent.student_forwards += metrics.student_forwards
            self.spent.teacher_forwards += metrics.teacher_forwards
        return rollouts
