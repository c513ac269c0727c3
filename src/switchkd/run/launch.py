"""A run from its configuration to its model: check everything, then train stage after stage, and keep what happened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback

from switchkd.data.sets import resolve
from switchkd.errors import Stopped, Unreachable, UserError
from switchkd.methods.describe import describe_objective
from switchkd.models.chat import set_template
from switchkd.models.hub import offline_at_once
from switchkd.models.load import load_pair, load_teachers, load_tokenizer, load_tokenizers
from switchkd.models.pair import ModelPair
from switchkd.models.sources import find_source
from switchkd.records import Example
from switchkd.report.plots import save_curves
from switchkd.report.terminal import run_table
from switchkd.run.callbacks import ConsoleProgress, LogFile, StopCleanly
from switchkd.run.file import RunConfig, Stage
from switchkd.run.folder import check_output_dir, record_run, save_final
from switchkd.run.resume import agreed_checkpoint, check_length, check_order, check_start, is_finished
from switchkd.run.rollout_view import RolloutView
from switchkd.run.written import LOG_FILE, ROLLOUTS_FILE, RUN_FILE, read_log
from switchkd.training.card import Origins
from switchkd.training.checkpoints import has_optimizer, last_complete_checkpoint
from switchkd.training.dataset import evaluated, tokenized, warn_of_templates
from switchkd.training.taught import TeacherModel
from switchkd.training.teachers import loading_options
from switchkd.training.trainer import SwitchTrainer

_NO_CHECKPOINT = " There is no checkpoint: it begins again at step 0."


@dataclass(frozen=True)
class PreparedStage:
    """A stage with its examples, checked."""

    stage: Stage
    peft_config: Any
    train: Sequence[Example]
    eval: Sequence[Example] | None


def train_run(run: RunConfig, console: Console, *, resume: bool = False) -> None:
    """Train a run and leave its model in the run's folder, with run.yaml, log.jsonl and environment.json beside it.

    Everything is checked before the first model is loaded: methods, settings, folder, data, in this order. `resume` continues
    from the last complete checkpoint and skips finished stages. Raises UserError for whatever does not fit, and Stopped
    where Ctrl-C ended the run.
    """
    # From the launcher: accelerate knows it only once it has taken the devices, and the checks come before that.
    is_main_process = os.environ.get("RANK", "0") == "0"
    stages = run.in_stages()
    if is_main_process:
        check_output_dir(run, resume)
    to_do = [stage for stage in stages if not is_finished(stage)]
    if not to_do:
        console.print(f"The run in {run.output_dir} is finished; there is nothing to do.", markup=False, soft_wrap=True)
        return
    check_order(to_do[0], stages[stages.index(to_do[0]) + 1 :])
    if resume and is_main_process:
        check_start(to_do[0])
    if any(stage.config.push_to_hub for stage in to_do) and offline_at_once():
        raise UserError(
            "push_to_hub is true, but the hub cannot be reached from here; leave it out, and push afterwards"
        )
    all_prepared = _prepare(to_do)
    if resume and is_main_process:
        check_length(to_do[0], len(all_prepared[0].train))
    not_pushed: list[str] = []
    for number, prepared in enumerate(all_prepared):
        if number:
            # A trainer may be in reference cycles, and its models and optimizer fill the device that this stage needs.
            clear_device_cache(garbage_collection=True)
        # What comes after the first has never begun.
        problem = _train_stage(prepared, run, console, is_main_process, resume and not number)
        not_pushed += [problem] if problem else []
    if is_main_process:
        events = read_log(Path(run.output_dir) / LOG_FILE)
        console.print(run_table(events, Path(run.output_dir)))
        save_curves(events, Path(run.output_dir) / "curves.png")
    # Last, for the models are trained, and the other processes have ended.
    if not_pushed:
        raise UserError("; ".join(not_pushed))


def _prepare(to_do: Sequence[Stage]) -> list[PreparedStage]:
    """The examples of each stage; the cheap checks of all stages come before the expensive ones of any."""
    sources = []
    # Names and files first: a mistyped teacher of the last stage must not wait for the tokenizing of the first.
    for stage in to_do:
        run = stage.run
        read = partial(resolve, data_dir=run.data_dir, columns=run.columns, seed=stage.config.seed)
        train = read(run.train_data, "train", stream_rows=_rows_needed(stage))
        held_out = read(run.eval_data, "eval") if run.eval_data else None
        if find_source(stage.tokenizer).gguf_file is not None and run.adapter == "keep":
            raise UserError(
                f"adapter is keep, but nothing loads one onto a .gguf file ({run.student}); set adapter to merge"
            )
        for name in run.teachers_here.values() if stage.config.plan.needs_teacher else ():
            find_source(name)
        sources.append((stage, _peft_config(run), train, held_out))
    prepared = []
    for stage, peft_config, train, held_out in sources:
        tokenizer = load_tokenizer(
            stage.tokenizer, trust_remote_code=stage.run.trust_remote_code, revision=stage.tokenizer_revision
        )
        asked = stage.config.plan.needs_teacher
        theirs = load_tokenizers(
            stage.run.teachers_here if asked else {},
            # Before a model is loaded; of a single teacher, the pair says it.
            tokenizer if stage.run.teachers else None,
            trust_remote_code=stage.run.trust_remote_code,
            revision=stage.run.teacher_revision,
        )
        set_template(tokenizer, theirs.get("") or _for_its_template(stage), stage.config.template_from)
        for each in theirs.values():
            warn_of_templates(train, tokenizer, each, stage.config)
        needs_response, names = stage.config.plan.needs_response, tuple(stage.run.teachers or ()) if asked else ()
        train_examples = tokenized(train, tokenizer, stage.config, need_response=needs_response, teachers=names)
        eval_examples = evaluated(held_out, tokenizer, stage.config, names) if held_out else None
        prepared.append(PreparedStage(stage, peft_config, train_examples, eval_examples))
    return prepared


def _for_its_template(stage: Stage) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher that brings its chat template, where the method asks nothing else of it."""
    if stage.config.template_from != "teacher" or not stage.run.is_teacher_named:
        return None
    trusted, revision = stage.run.trust_remote_code, stage.run.teacher_revision
    return load_tokenizer(str(stage.run.teacher), trust_remote_code=trusted, revision=revision)


def _rows_needed(stage: Stage) -> int | None:
    """The rows that the stage's steps ask for; None where it counts epochs."""
    config = stage.config
    rows = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return rows * config.max_steps if config.max_steps > 0 else None


def _peft_config(config: RunConfig) -> Any:
    if config.peft is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("peft is set, but the package peft is not installed; pip install 'switchkd[peft]'") from None
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **config.peft})
    except (TypeError, ValueError) as error:
        raise UserError(f"peft is {config.peft!r}, which peft.LoraConfig does not take: {error}") from error


def _train_stage(
    prepared: PreparedStage, run: RunConfig, console: Console, is_main_process: bool, resume: bool
) -> str | None:
    """Train a stage and save its model. Returns why that was not pushed, where it was to be."""
    stage = prepared.stage
    with console.status(f"loading {stage.run.student} ..."):
        trainer, stopper, progress = _trainer(prepared, run, console)
    checkpoint = agreed_checkpoint(stage.folder) if resume else None
    if is_main_process:
        # Only now that everything has loaded: once the folder is marked as a run, another attempt without --resume is refused.
        record_run(run if run.stages else _with_rate(run, trainer.args.learning_rate))
        starts = f" Goes on from {checkpoint}." if checkpoint else _NO_CHECKPOINT if resume else ""
        console.print(_first_lines(trainer, stage) + starts, highlight=False, markup=False, soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        progress.close()
        raise Stopped(_how_to_resume(run, stage, f"stopped at once, after step {trainer.state.global_step}")) from None
    except Unreachable as error:
        step = f"{error}; stopped after step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise Unreachable(_how_to_resume(run, stage, step)) from error
    finally:
        progress.close()
        stopper.close()
    if stopper.stopped:
        step = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        raise Stopped(_how_to_resume(run, stage, f"stopped after step {step}"))
    with trainer.whole.gathered_to_save(here=is_main_process):
        if is_main_process:
            model: Any = trainer.whole.pair.student
            if prepared.peft_config is not None and stage.run.adapter == "merge":
                model = model.merge_and_unload()
            is_adapter = prepared.peft_config is not None and stage.run.adapter == "keep"
            files = save_final(model, trainer.pair.tokenizer, stage, trainer.card(is_adapter=is_adapter))
    # The next stage reads what was saved.
    trainer.accelerator.wait_for_everyone()
    return trainer.push_final(stage.model_folder, files) if is_main_process and stage.config.push_to_hub else None


def _trainer(
    prepared: PreparedStage, run: RunConfig, console: Console
) -> tuple[SwitchTrainer, StopCleanly, ConsoleProgress]:
    stage = prepared.stage
    pair = load_pair(
        stage.run.student,
        stage.run.teacher if stage.config.plan.needs_teacher and stage.run.is_teacher_named else None,
        placement=stage.config.placement,
        student_quantization=stage.run.student_quantization,
        teacher_quantization=stage.run.teacher_quantization,
        trust_remote_code=stage.run.trust_remote_code,
        student_drop_layers=stage.run.student_drop_layers,
        model_init_kwargs=stage.config.model_init_kwargs,
        teacher_model_init_kwargs=loading_options(stage.config),
    )
    if pair.teacher_tokenizer is None and (speaker := _for_its_template(stage)) is not None:
        pair = replace(pair, teacher_tokenizer=speaker, tokenizers_agree=False)
    stopper, progress = StopCleanly(console), ConsoleProgress(console)
    trainer = SwitchTrainer(
        pair,
        _beside_pair(stage, pair),
        args=stage.config,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        peft_config=prepared.peft_config,
        callbacks=[LogFile(Path(run.output_dir) / LOG_FILE, stage.name), progress, stopper],
    )
    if prepared.peft_config is not None:
        # Names such as world:student lead nowhere elsewhere.
        adapted: Any
        for adapted in (trainer.pair.student, trainer.whole.pair.student):
            adapted.active_peft_config.base_model_name_or_path = find_source(stage.run.student).place
    stages = (*stage.before, stage.name) if stage.name else ()
    trainer.origins = Origins(run.student, _teacher_names(trainer, stage), stage.run.train_data, stages)
    trainer.remove_callback(PrinterCallback)
    view = RolloutView(trainer, console, Path(run.output_dir) / ROLLOUTS_FILE, stage.name)
    trainer.add_callback(view)
    trainer.tell_written(view.on_written)
    trainer.tell_rollouts(progress.on_rollouts)
    return trainer, stopper, progress


def _beside_pair(stage: Stage, pair: ModelPair) -> str | dict[str, TeacherModel] | None:
    """The trainer's teacher where the pair has none: "self", a server, or several by name, loaded where anything asks them."""
    if not stage.run.teachers:
        return None if stage.run.is_teacher_named else stage.run.teacher
    given: dict[str, TeacherModel] = {**stage.run.teachers}
    if not stage.config.plan.needs_teacher:
        return given
    place = stage.config.placement
    loaded = load_teachers(
        stage.run.teachers_here,
        pair.tokenizer,
        trust_remote_code=stage.run.trust_remote_code,
        dtype=place.teacher_dtype,
        device=place.device,
        init_kwargs=place.init_kwargs(loading_options(stage.config)),
        quantization=stage.run.teacher_quantization,
    )
    return given | loaded


def _teacher_names(trainer: SwitchTrainer, stage: Stage) -> str | dict[str, str | None] | None:
    """What the card calls the teacher, or each of several: as the run file does, but for one on a server."""
    if not stage.config.plan.needs_teacher:
        return None
    given: dict[str, str | None] = {**stage.run.teachers} if stage.run.teachers else {"": stage.run.teacher}
    names = {name: each.remote.name if each.remote else given[name] for name, each in trainer.taught.items()}
    return names.get("") if "" in names else names


def _first_lines(trainer: SwitchTrainer, stage: Stage) -> str:
    computes = f"Computes {stage.config.placement.describe()}: {describe_objective(stage.config)}."
    return f"{trainer.describe()}.\n{computes}\n{_marks(trainer)} Writes to {stage.model_folder}."


def _with_rate(run: RunConfig, rate: float | None) -> RunConfig:
    """The run with the learning rate that is in force: where it was left open, the student decided."""
    return replace(run, training={"learning_rate": rate, **run.training})


def _marks(trainer: SwitchTrainer) -> str:
    """What plain text begins with, and where any text ends."""
    tokenizer: Any = trainer.pair.tokenizer
    first, last = trainer.args.rendering.leading_ids(tokenizer), list(trainer.pair.eos_ids)
    begins = f"with {''.join(tokenizer.convert_ids_to_tokens(first))}" if first else "without BOS"
    return f"Text begins {begins}, ends at {' or '.join(tokenizer.convert_ids_to_tokens(last))}."


def _how_to_resume(run: RunConfig, stage: Stage, what: str) -> str:
    kept = last_complete_checkpoint(stage.folder)
    place = f" of stage {stage.name}" if stage.name else ""
    if kept and not has_optimizer(kept):
        return (
            f"{what}{place}: {kept} is kept, but nothing goes on from it, since save_only_model left its optimizer out"
        )
    keeps = f"{kept} is kept" if kept else "there is no checkpoint yet"
    return f"{what}{place}: {keeps}; go on with: switchkd train {Path(run.output_dir) / RUN_FILE} --resume"
