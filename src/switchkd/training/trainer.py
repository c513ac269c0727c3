"""`SwitchTrainer`: `transformers.Trainer`, with the rollouts of an optimiser step made before it and our objective in it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from switchkd.data.collate import collate, micro_batches, response_ids
from switchkd.data.rows import read_rows, to_examples
from switchkd.errors import UserError
from switchkd.loss.measures import MEASURE_NAMES, sums_of
from switchkd.loss.objective import Report, TeacherSignal, dense_teacher, distillation_loss
from switchkd.loss.policy_gradient import importance_and_returns
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import check_evaluation, plan_of
from switchkd.models.heads import last_hidden
from switchkd.models.pair import ModelPair, load_model, load_tokenizer, name_of, parameter_count
from switchkd.records import Batch, Example, Rollout
from switchkd.rollout.engine import Engine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.training.meters import Meters
from switchkd.training.step_text import TEXT_MEASURES, StepText
from switchkd.training.teacher_states import with_teacher_states
from switchkd.training.teacher_text import manifest_of, teacher_text
from switchkd.training.teachers import SELF, TeacherPlace, check_offload, self_teacher

if TYPE_CHECKING:
    from peft import PeftConfig


class SwitchTrainer(Trainer):
    """Trains a student on text that student and teacher write together; the call is that of `transformers.Trainer`.

    `model` and `teacher_model` are names or models (no teacher is needed for method "sft"; "self" is the student without
    its adapter); `processing_class` is the
    tokenizer of both (loaded from the student's name where it is left out); `train_dataset` and `eval_dataset` hold rows as
    data/rows.py reads them, or `Example` records; `peft_config` makes the student an adapter. `engine` replaces the rollout engine.

    All prompts of an optimiser step are rolled out in one call before its first forward, each with its row's number as
    prompt id and the step as sample id: what is rolled out depends on neither the batch split nor the processes. The
    loss is summed over the trained response tokens and divided by their count over the whole step and all processes.

    Raises UserError, before the first forward, for settings, models or data that do not fit.
    """

    args: SwitchConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: SwitchConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        engine: Engine | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ) -> None:
        args = args or SwitchConfig(output_dir="runs/switchkd")
        self.plan = plan_of(args)
        check_evaluation(self.plan, args, has_data=eval_dataset is not None)
        if self.plan.needs_teacher and teacher_model is None:
            raise UserError(f"method {args.method!r} learns from a teacher, but none was given; set teacher_model")
        self.pair = _pair_of(model, teacher_model, processing_class, peft_config)
        if self.pair.teacher is not None:
            check_offload(self.pair.teacher, args.teacher_offload)
            self.pair.teacher.requires_grad_(False)
        super().__init__(
            model=self.pair.student,
            args=args,
            data_collator=self._collate,
            train_dataset=self._examples(train_dataset, args, need_response=self.plan.needs_response),
            eval_dataset=self._examples(eval_dataset, args, need_response=True),
            processing_class=self.pair.tokenizer,
            callbacks=callbacks,
            **trainer_options,
        )
        if self.plan.rolls_out and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "rollouts need whole weights on every process, which FSDP and DeepSpeed take apart; run this method with "
                "plain data parallelism (accelerate launch --multi_gpu), or train on data (sft, kd)"
            )
        # Our loss is divided by the whole step's count, so the trainer must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.engine = engine or SpeculativeEngine(self.pair, args.block_size, max_rows=args.rollout_rows)
        self._check_room()
        self._place = None
        if self.pair.teacher is not None:
            self._place = TeacherPlace(self.pair.teacher, args.teacher_offload, args.device, Path(str(args.output_dir)))
        self._meters = Meters([*TEXT_MEASURES, "train_tokens_per_second", *MEASURE_NAMES])
        self._text = StepText(self.plan, args, self.pair, self._meters, cast(Any, self.train_dataset) or ())
        if self._text.share:
            self.add_callback(self._text.share)
        self._step_started = 0.0
        self._step_tokens = 0

    def describe(self) -> str:
        """One line that says what `train` will do: models, sizes, steps, sequences and tokens."""
        args = self.args
        dataset: Sequence[Example] = self.train_dataset  # type: ignore[assignment]
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * -(-len(dataset) // rows))
        teacher = self.pair.teacher
        learns_from = f" from {name_of(teacher)} ({parameter_count(teacher) / 1e6:.3g}M)" if teacher is not None else ""
        writes = f"{self.plan.rollout_share:.0%} rolled out" if self.plan.rollout_share else "the data set's text"
        return (
            f"{args.method}: {name_of(self.pair.student)} ({parameter_count(self.pair.student) / 1e6:.3g}M parameters) learns"
            f"{learns_from}: {steps:,} steps x {rows} sequences ({writes}) of up to {args.max_new_tokens} response tokens, "
            f"at most {steps * rows * args.max_new_tokens / 1e6:.3g}M tokens, from {len(dataset):,} rows"
        )

    # ------------------------------------------------------------------------------------------------------- the data

    def _examples(self, dataset: Any, args: SwitchConfig, need_response: bool) -> Any:
        """The rows of a data set (or of each in a mapping of them) as records, checked."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._examples(part, args, need_response) for name, part in dataset.items()}
        if len(dataset) and isinstance(dataset[0], Example):
            empty = sum(not example.response_ids for example in dataset)
            if need_response and empty:
                raise UserError(f"{empty} of {len(dataset)} examples have no response; give their response_ids")
            return list(dataset)
        if self.pair.tokenizer is None:
            raise UserError("the rows are text, but there is no tokenizer; give processing_class")
        loaded = to_examples(
            read_rows(dataset),
            self.pair.tokenizer,
            max_prompt_tokens=args.max_prompt_tokens,
            max_response_tokens=args.max_new_tokens,
            need_response=need_response,
            skip_bad_rows=args.skip_bad_rows,
        )
        if not loaded.examples:
            raise UserError(
                "the data set has no usable row; check its path and the reasons given for each row left out"
            )
        return loaded.examples

    def _check_room(self) -> None:
        """Raises UserError where the longest sequence that can come up exceeds the positions of a model."""
        parts = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        rolled_out = self.args.max_new_tokens if self.plan.rolls_out or self.plan.teacher_text else 0
        lengths = [
            len(example.prompt.token_ids) + max(len(example.response_ids), rolled_out)
            for part in (self.train_dataset, *parts)
            for example in cast(Sequence[Example], part or ())
        ]
        self.pair.check_room(max(lengths, default=0))

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        """The examples as they are, since a rollout may stand in for one; the row numbers let the loops count them."""
        return {"examples": examples, "rows": torch.arange(len(examples))}

    def _inputs(self, sequences: Sequence[Example | Rollout]) -> dict[str, Any]:
        """What the trainer passes on; `input_ids` is there for its own counting of tokens and operations."""
        batch = collate(sequences, self.pair.pad_id)
        return {"input_ids": batch.input_ids_BT, "batch": batch}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step, rolled out, and the count of their trained tokens over all processes."""
        self._measure_step()
        loaded, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not loaded:
            return loaded, None
        with self._teacher_at_work():
            examples = [example for inputs in loaded for example in inputs["examples"]]
            written = self._text.write(examples, self.state, self.engine, self.log)
            self._step_started = time.perf_counter()
            sequences = self._scored(written)
        # Rows of one length go together; the number of micro-batches stays the loader's.
        groups = micro_batches(
            [len(s.prompt.token_ids) + len(response_ids(s)) for s in sequences],
            max(len(inputs["examples"]) for inputs in loaded),
        )
        batches = [self._inputs([sequences[index] for index in group]) for group in groups]
        self._step_tokens = sum(len(response_ids(sequence)) for sequence in sequences)
        counted = sum(self._counted(inputs["batch"]) for inputs in batches)
        # Where the policy left nothing to train on, the loss is 0 and not 0 / 0.
        return batches, self.accelerator.gather(torch.tensor([counted], device=device)).sum().clamp(min=1)

    def _measure_step(self) -> None:
        if self._step_tokens:
            self._meters.add("train_tokens_per_second", self._step_tokens, time.perf_counter() - self._step_started)
            self._step_tokens = 0

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's sum over this micro-batch / the trained tokens of the whole step, in nats a token."""
        batch: Batch = inputs["batch"].to(self.args.device)
        denominator = max(1, self._counted(batch)) if num_items_in_batch is None else num_items_in_batch
        every = self.args.measure_every
        measure = every > 0 and self.state.global_step % every == 0
        loss, report = self._loss(model, batch, denominator, measure=measure)
        for name, total, count in sums_of(report, batch):
            self._meters.add(name, total, count)
        # Data parallelism takes the mean of the processes' gradients; ours are parts of one sum.
        loss = loss * self.accelerator.num_processes if num_items_in_batch is not None else loss
        return (loss, {"report": report}) if return_outputs else loss

    def _loss(
        self, model: nn.Module, batch: Batch, denominator: Tensor | float, *, measure: bool = False
    ) -> tuple[Tensor, Report]:
        counted = batch.response_mask_BT[:, 1:]
        return distillation_loss(
            last_hidden(model, self.pair.student, batch.input_ids_BT, batch.attention_mask_BT)[:, :-1][counted],
            self.pair.student_head,
            batch.input_ids_BT[:, 1:][counted],
            self.plan.objective,
            teacher=self._teacher_signal(batch),
            denominator=denominator,
            weight_N=self._weights(batch),
            written_by_teacher_N=batch.written_by_teacher_BT[:, 1:][counted],
            return_N=self._importance_and_returns(batch)[1],
            measure=measure,
        )

    def _weights(self, batch: Batch) -> Tensor:
        mask = batch.response_mask_BT
        weight_N = self.plan.objective.weights(batch.written_by_teacher_BT[mask], batch.rolled_out_BT[mask])
        importance_N, _ = self._importance_and_returns(batch)
        return weight_N if importance_N is None else weight_N * importance_N

    def _importance_and_returns(self, batch: Batch) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not self.plan.objective.long_term_weight:
            return None, None
        importance_BT, return_BT = importance_and_returns(batch, self.plan.policy)
        return importance_BT[batch.response_mask_BT].float(), return_BT[batch.response_mask_BT].float()

    def _counted(self, batch: Batch) -> int:
        """The number of response tokens that are trained on: those of a weight other than 0."""
        return int(self._weights(batch).count_nonzero())

    def _teacher_at_work(self) -> AbstractContextManager[None]:
        return nullcontext() if self._place is None else self._place.at_work()

    def _scored(self, sequences: Sequence[Example | Rollout]) -> Sequence[Example | Rollout]:
        """The sequences with what the teacher says of them, where the objective asks."""
        if self.plan.objective.divergence is None or self.pair.teacher is None:
            return sequences
        with self._teacher_at_work(), self.compute_loss_context_manager():
            return with_teacher_states(
                sequences,
                self.pair.teacher,
                self.pair.pad_id,
                rows=self.args.train_batch_size,
                device=self.args.device,
            )

    def _teacher_signal(self, batch: Batch) -> TeacherSignal | None:
        if self.plan.objective.divergence is None or self.pair.teacher_head is None:
            return None
        assert batch.teacher_hidden_NH is not None
        return dense_teacher(batch.teacher_hidden_NH, self.pair.teacher_head, self.plan.objective.loss_temperature)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with the means of our own measures in training's lines."""
        if "loss" in logs:
            self._measure_step()
            logs = {**logs, **self._meters.drain(lambda sums: self.accelerator.gather(sums.to(self.args.device)).cpu())}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------- the evaluation

    def evaluation_loop(self, dataloader: Any, *positional: Any, **named: Any) -> EvalLoopOutput:
        """As in `transformers.Trainer`; eval_loss is the objective on the data set's responses, in nats a token."""
        examples: Sequence[Example] = dataloader.dataset
        self._eval_tokens_per_row = sum(len(example.response_ids) for example in examples) / max(1, len(examples))
        with self._teacher_at_work():
            return super().evaluation_loop(dataloader, *positional, **named)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The micro-batch's loss; scaled so that the loop's mean over rows is the mean over tokens, however they are split."""
        batch = collate(self._scored(inputs["examples"]), self.pair.pad_id).to(self.args.device)
        denominator = batch.input_ids_BT.shape[0] * self._eval_tokens_per_row
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _ = self._loss(model, batch, denominator)
        return loss.detach(), None, None

    # ------------------------------------------------------------------------------------------------ the checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `transformers.Trainer`; True resumes from the newest checkpoint that is complete.

        Raises UserError where there is none: from a partial one the run would start anew with its weights.
        """
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            found = named or last_complete_checkpoint(str(self.args.output_dir))
            if found is None or not (found / TRAINER_STATE_NAME).is_file():
                place = named or self.args.output_dir
                raise UserError(f"there is no complete checkpoint in {place}; name another, or train without resuming")
            resume_from_checkpoint = str(found)
            if self._text.replay is not None:
                self._text.replay.load(found)
        elif self._text.replay is not None:
            self._text.replay.rollouts.clear()
        if self.plan.teacher_text is not None:
            self.train_dataset = self._teacher_text(self.plan.teacher_text)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _teacher_text(self, path: Path) -> Any:
        args, teacher = self.args, cast(PreTrainedModel, self.pair.teacher)
        examples: Sequence[Example] = self.train_dataset  # type: ignore[assignment]
        with self._teacher_at_work():
            manifest = manifest_of(teacher, examples, args.sampling, args.seed)
            is_main = self.is_world_process_zero()
            found = teacher_text(path, manifest, examples, self.engine, args.sampling, args.seed, writes=is_main)
        self.accelerator.wait_for_everyone()
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            # Before the trainer's state, which closes a checkpoint.
            if self._text.replay is not None and self.args.should_save:
                self._text.replay.save(folder)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # A partial checkpoint must not be taken for one; the earlier ones are only rotated after a whole one.
            shutil.rmtree(folder, ignore_errors=True)
            kept = last_complete_checkpoint(folder.parent)
            keeps = f"the last good one is {kept}" if kept else "there is no earlier one"
            raise UserError(
                f"the checkpoint {folder} could not be written ({error}); {keeps}; make room and resume"
            ) from error


def _pair_of(
    model: PreTrainedModel | str,
    teacher_model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
) -> ModelPair:
    """The pair that `SwitchTrainer` was given, names loaded and the student with its adapter."""
    # A model that was made on the spot has no name, and needs no tokenizer for data that is token ids.
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    tokenizer = load_tokenizer(name) if tokenizer is None and name else tokenizer
    named = isinstance(teacher_model, str) and teacher_model != SELF
    teacher_tokenizer = load_tokenizer(cast(str, teacher_model)) if named else None
    student = load_model(model) if isinstance(model, str) else model
    if peft_config is not None:
        from peft import get_peft_model

        student = cast(PreTrainedModel, get_peft_model(student, peft_config))
    teacher = self_teacher(student) if teacher_model == SELF else teacher_model
    teacher = load_model(teacher) if isinstance(teacher, str) else teacher
    return ModelPair(student, teacher, tokenizer, teacher_tokenizer)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in a run's folder that was written to its end, or None.

    The trainer's state is what a checkpoint is closed with: without it, the writing was cut off.
    """
    states = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    found = [path.parent for path in states if _is_json(path)]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
