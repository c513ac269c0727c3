"""`SwitchTrainer`: `transformers.Trainer` with the text of each optimizer step made before it, and our objective in it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from switchkd.errors import Unreachable, UserError
from switchkd.loss.measures import MEASURE_NAMES, rows_of, sums_by_teacher, sums_of, teacher_names
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout
from switchkd.rollout.engine import Engine
from switchkd.serving.engine import VllmEngine
from switchkd.training.card import model_card, origins_of, write_card
from switchkd.training.checkpoints import FOLDER_PREFIX, checkpoint_to_resume, writing_checkpoint
from switchkd.training.costs import Costs
from switchkd.training.dataset import evaluation_examples, training_examples, with_row_numbers
from switchkd.training.engine import engine_of
from switchkd.training.evaluating_trainer import EvaluatingTrainer
from switchkd.training.learning_rate import learning_rate_for
from switchkd.training.loaded_steps import LoadedStep, loaded_steps, steps_at_once
from switchkd.training.machine import check_one_device, warn_if_weights_stand_still
from switchkd.training.meters import Meters
from switchkd.training.outlook import check_call, check_room, check_writing_room, describe_training, teachers_in_words
from switchkd.training.step_loss import StepLoss
from switchkd.training.step_text import TEXT_MEASURES, StepText, WrittenText
from switchkd.training.taught import TeacherModel, first_pair, keep_ends, named, taught_student
from switchkd.training.teacher_share_alarm import teacher_share_alarm
from switchkd.training.teacher_text import teacher_text
from switchkd.training.written_step import WrittenStep

if TYPE_CHECKING:
    from peft import PeftConfig


class TrainerOptions(TypedDict, total=False):
    """The keywords of `SwitchTrainer` that are seldom needed: ours, then those of `transformers.Trainer` that act here."""

    engine: Engine | None  # in place of a SpeculativeEngine
    callbacks: list[TrainerCallback] | None
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None


class SwitchTrainer(EvaluatingTrainer):
    """Trains a student on text that student and teacher write together; the call is that of `transformers.Trainer`.

    `model` and `teacher_model` are names or models. No teacher is needed for method "sft", "self" is the student without its
    adapter, and an address, http://host:8000, a teacher on a server of vLLM's (docs/vllm.md). Several teachers are a mapping,
    {"math": ..., "chat": ...}, and each row names its own in its column `args.teacher_column` (docs/data.md). `model` may be a
    `ModelPair` too, which brings teacher and tokenizer. `processing_class` is the tokenizer of all (by default that of the
    student's name).
    `train_dataset` and `eval_dataset` hold rows as data/rows.py reads them, or `Example` records. `peft_config` makes the student
    an adapter.

    All prompts of an optimizer step, or of `args.rollout_steps` of them, are rolled out in one call before its first forward,
    each with its row's number as prompt id and its step as sample id, so the text depends on neither the batch split nor the
    processes. The loss is summed over the trained response tokens and divided by their count over the whole step and all processes.

    Raises UserError, before the first forward, for settings, models or data that do not fit.
    """

    args: SwitchConfig
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: ModelPair | PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | Mapping[str, TeacherModel] | None = None,
        args: SwitchConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **options: Unpack[TrainerOptions],
    ) -> None:
        args = args or SwitchConfig(output_dir="runs/switchkd")
        check_call(args, model, teacher_model, options.keys() - TrainerOptions.__annotations__.keys())
        self.plan = args.plan
        args.check_evaluation(has_data=eval_dataset is not None)
        self.taught = taught = taught_student(model, teacher_model, processing_class, peft_config, args)
        self.pair = pair = first_pair(taught)
        check_one_device(args, [each.pair for each in taught.values()])
        keep_ends(taught)
        # For the model card; a run knows better names.
        self.origins = origins_of(taught)
        args.learning_rate = learning_rate_for(pair.student, args.learning_rate)
        engine = options.pop("engine", None)
        super().__init__(
            model=pair.student,
            args=args,
            data_collator=with_row_numbers,
            train_dataset=training_examples(train_dataset, taught, args),
            eval_dataset=evaluation_examples(eval_dataset, taught, args),
            processing_class=pair.tokenizer,
            **dict[str, Any](**options),
        )
        check_room(taught, args, self.train_dataset, self.eval_dataset)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and not self.is_deepspeed_enabled:
            warn_if_weights_stand_still(pair.student, args)
        # Our loss is divided by the whole step's count, so the trainer must not divide it again.
        self.loss_is_scaled_for_ga = True
        # Before its weights leave for another place.
        self._learns_from = teachers_in_words(taught)
        self._make_parts(engine)
        self._step_started, self._step_tokens = 0.0, 0

    def _make_parts(self, engine: Engine | None) -> None:
        """What makes a step's text and its loss, and what counts and measures both."""
        args, plan = self.args, self.plan
        if engine is not None and named(self.taught):
            raise UserError(
                "engine is given, but there are several teachers, each with an engine of its own; leave it out"
            )
        reading = self._read_whole(self.taught)
        with self.reading():
            self.engine = engine or engine_of(reading, args, in_parts=self.in_parts)
            if isinstance(self.engine, VllmEngine):
                check_writing_room(self.engine, args, self.train_dataset, self.eval_dataset)
            self._loss = StepLoss(self.taught, plan, rows=args.train_batch_size, reading=reading)
        self.costs = Costs(args)
        self._loss.on_forward = self.costs.count
        self._loss.before_head = self._head.gather
        by_teacher = teacher_names(named(self.taught))
        self._meters = Meters([*TEXT_MEASURES, "train_tokens_per_second", *MEASURE_NAMES, *by_teacher])
        pairs = {name: each.pair for name, each in reading.items()}
        # What is written for steps that are still to come.
        self._ready: deque[tuple[LoadedStep, WrittenText]] = deque()
        self._newest: Sequence[Rollout] = ()
        self._text = StepText(args, pairs, self._meters, self.train_dataset or ())
        for callback in filter(None, (self.costs, self._text.share, teacher_share_alarm(plan))):
            self.add_callback(callback)

    @property
    def newest_rollouts(self) -> list[Rollout]:
        """The rollouts of this process in the newest step, in the order of its rows, without the teacher's states."""
        return [*self._newest]

    def tell_written(self, told: Callable[[WrittenStep], None]) -> None:
        """Once a step's rollouts are there, call `told` with them, before anything is trained on them."""

        def told_in_a_pause(written: WrittenStep) -> None:
            with self.costs.paused():
                told(written)

        self._text.on_written = told_in_a_pause

    def tell_rollouts(self, told: Callable[[int, int], None]) -> None:
        """While text is rolled out, call `told` with the number of finished rollouts and the number there will be."""
        self._text.on_progress = told

    def card(self, given: dict[str, Any] | None = None, *, is_adapter: bool | None = None) -> str:
        """The text of the model card as it is now; `given` and `is_adapter` as in `model_card`."""
        adapted = hasattr(self.pair.student, "peft_config") if is_adapter is None else is_adapter
        return model_card(self.origins, self.args, self.state.global_step, is_adapter=adapted, given=given)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`, with the same keywords, but the card says what a distillation was; see `model_card`."""
        if self.is_world_process_zero():
            write_card(Path(str(self.args.output_dir)), self.card(kwargs))

    def describe(self) -> str:
        """One line that says what `train` will do: models, sizes, steps, sequences and tokens."""
        return describe_training(self.pair, self.args, len(self.train_dataset), self._learns_from)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, rolled out, and the count of their trained tokens over all processes."""
        self._measure_speed()
        if not self._ready and (loaded := self._loaded(epoch_iterator)):
            self._ready.extend(zip(loaded, self._written(loaded), strict=True))
        elif self._ready:
            self._step_started = time.perf_counter()
        else:
            return [], None
        step, text = self._ready.popleft()
        self._newest = text.rollouts
        for name in named(self.taught):
            self._meters.add(rows_of(name), sum(each.prompt.teacher == name for each in step.rows), len(step.rows))
        # As many micro-batches as the loader gave: transformers counts them to find the end of a step.
        batches = self._loss.micro_batches(text.sequences, max(map(len, step.batches)))
        self._step_tokens = sum(inputs["batch"].response_tokens for inputs in batches)
        parts = torch.tensor([sum(inputs["denominator"] for inputs in batches)], device=device)
        # Where the policy left nothing to train on, the loss is 0 and not 0 / 0.
        return batches, self._loss.not_zero(self.accelerator.gather(parts).sum())

    def _loaded(self, epoch_iterator: Iterator[Any]) -> list[LoadedStep]:
        """The rows of the steps that are written next; none at the epoch's end."""
        return loaded_steps(
            (inputs["examples"] for inputs in epoch_iterator),
            steps_at_once(self.args.rollout_steps, self.state, self.args),
            self.args.gradient_accumulation_steps,
            lambda batch: self._without_repeats(batch, len(self.train_dataset)),
        )

    def _written(self, loaded: Sequence[LoadedStep]) -> list[WrittenText]:
        """The text of these steps, read by the teachers."""
        with self.reading(), self.pair.computing():
            engine = self.costs.counting(self.engine)
            try:
                texts = self._text.sequences_of_steps([step.rows for step in loaded], self.state, engine, self.log)
                sequences = [[*text.sequences, *step.fillers] for text, step in zip(texts, loaded, strict=True)]
                self._step_started = time.perf_counter()
                scored = self._loss.scored([*chain(*sequences)])
            except Unreachable:
                # Nothing of these steps is trained on yet: what there is, is what the last one left.
                self._save_checkpoint(self.pair.student, None)
                raise
        self._text.keep_scored(scored)
        of_steps = iter(scored)
        return [
            text._replace(sequences=[*islice(of_steps, len(own))]) for text, own in zip(texts, sequences, strict=True)
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's sum over this micro-batch / the trained tokens of the whole step, in nats a token."""
        inputs = self._on_device(inputs)
        alone = self._loss.not_zero(torch.tensor(inputs["denominator"]))
        denominator = alone if num_items_in_batch is None else num_items_in_batch
        every = self.args.measure_every
        measure = every > 0 and self.state.global_step % every == 0
        with self.pair.computing():
            loss, report = self._loss(model, inputs, denominator, measure=measure)
        for name, total, count in chain(*(sums(report, inputs["batch"]) for sums in (sums_of, sums_by_teacher))):
            self._meters.add(name, total, count)
        # Data parallelism takes the mean of the processes' gradients; ours are parts of one sum.
        loss = loss * self.accelerator.num_processes if num_items_in_batch is not None else loss
        return (loss, {"report": report}) if return_outputs else loss

    def _measure_speed(self) -> None:
        if self._step_tokens:
            self._meters.add("train_tokens_per_second", self._step_tokens, time.perf_counter() - self._step_started)
            self._step_tokens = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with the means of our own measures in training's lines."""
        if "loss" in logs:
            self._measure_speed()
            measured = self._meters.drain(self._gathered)
            # Summed over processes like the tokens, but their seconds pass together.
            together = self.accelerator.num_processes
            measured |= {key: mean * together for key, mean in measured.items() if key.endswith("_per_second")}
            logs = {**logs, **measured}
            logs |= {"budget_used": self.costs.used} if self.costs.has_budget else {}
        if "train_runtime" in logs:
            logs = {**logs, **self.costs.totals(self._gathered)}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`; True resumes from the last checkpoint that is complete, or raises UserError."""
        checkpoint = None
        self._ready.clear()
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else resume_from_checkpoint
            checkpoint = checkpoint_to_resume(named, str(self.args.output_dir))
        if self._text.replay is not None:
            self._text.replay.load(checkpoint, self.taught)
        teachers = {name: each.pair.teacher for name, each in self.taught.items() if each.pair.teacher is not None}
        if self.plan.teacher_text is not None and teachers:
            with self.reading(), self.pair.computing(), self.costs.before_training():
                engine = self.costs.counting(self.engine)
                self.train_dataset, earlier = teacher_text(
                    self.plan.teacher_text, teachers, self.train_dataset, engine, self.args, self.costs.clock
                )
            self.costs.spent.training_seconds += earlier
        return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; rows are read as those that the trainer was made with."""
        # A name stands for one of several sets.
        if not isinstance(eval_dataset, str):
            eval_dataset = evaluation_examples(eval_dataset, self.taught, self.args)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `EvaluatingTrainer`; it is no part of what training costs."""
        with self.costs.paused():
            return super().evaluation_loop(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in `transformers.Trainer`, over the budget of the run where there is one."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.costs.follow(scheduler, num_training_steps)
        return scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{FOLDER_PREFIX}-{self.state.global_step}"
        with writing_checkpoint(folder, is_main=self.args.should_save):
            # Before the trainer's state, which completes a checkpoint.
            if self._text.replay is not None and self.args.should_save:
                self._text.replay.save(folder)
            if self.args.should_save:
                write_card(folder, self.card())
            super()._save_checkpoint(model, trial)
