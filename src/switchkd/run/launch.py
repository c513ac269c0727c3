"""A run from its configuration to its model: check everything, then train stage after stage, and keep what happened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback

from switchkd.data.rows import SourceRow, to_examples
from switchkd.data.sets import resolve
from switchkd.errors import Stopped, UserError
from switchkd.methods.plan import Plan
from switchkd.models.pair import load_pair, load_tokenizer
from switchkd.models.sources import find_source
from switchkd.records import Example
from switchkd.report.plots import save_curves
from switchkd.report.terminal import run_table
from switchkd.run.callbacks import ConsoleProgress, LogFile, StopCleanly, read_log
from switchkd.run.file import RunConfig, Stage
from switchkd.run.folder import LOG_FILE, RUN_FILE, admit, is_finished, record_run, save_final
from switchkd.training.teachers import SELF
from switchkd.training.trainer import SwitchTrainer, last_complete_checkpoint


@dataclass(frozen=True)
class Prepared:
    """A stage that was checked: what it carries out, on which examples."""

    stage: Stage
    plan: Plan
    peft_config: Any
    train: list[Example]
    eval: list[Example] | None


def train_run(run: RunConfig, console: Console, *, resume: bool = False) -> None:
    """Train a run and leave its model in the run's folder, with run.yaml, log.jsonl and environment.json beside it.

    Everything is checked before the first model is loaded: methods, settings, folder, data, in this order. `resume` goes
    on from the last complete checkpoint and leaves out the stages that are finished.
    Raises UserError for whatever does not fit, and Stopped where Ctrl-C ended the run.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    stages = run.in_stages()
    plans = [stage.plan() for stage in stages]
    if is_main_process:
        admit(run, resume)
    to_do = [(stage, plan) for stage, plan in zip(stages, plans, strict=True) if not is_finished(stage)]
    if not to_do:
        console.print(f"The run in {run.output_dir} is finished; there is nothing to do.", markup=False, soft_wrap=True)
        return
    _check_order([stage for stage, _ in to_do])
    for one in _prepare(to_do):
        _train_stage(one, run, console, is_main_process, resume)
    if is_main_process:
        events = read_log(Path(run.output_dir) / LOG_FILE)
        console.print(run_table(events, Path(run.output_dir)))
        save_curves(events, Path(run.output_dir) / "curves.png")


def _check_order(to_do: Sequence[Stage]) -> None:
    """Raise UserError where a later stage has begun from a student that would now be trained anew."""
    for stage in to_do[1:]:
        if last_complete_checkpoint(stage.folder):
            raise UserError(
                f"stage {to_do[0].name} is to be trained, but {stage.name} has already begun from it; set its max_steps and "
                f"num_train_epochs back, or give another output_dir"
            )


def _prepare(to_do: Sequence[tuple[Stage, Plan]]) -> list[Prepared]:
    """The examples of each stage; the cheap checks of all stages come before the dear ones of any."""
    sources = []
    for stage, plan in to_do:
        config = stage.config
        train = resolve(config.train_data, "train", data_dir=config.data_dir)
        held_out = resolve(config.eval_data, "eval", data_dir=config.data_dir) if config.eval_data else None
        find_source(stage.tokenizer)
        if config.teacher not in (None, SELF) and plan.needs_teacher:
            find_source(str(config.teacher))
        sources.append((stage, plan, _peft_config(config), train, held_out))
    prepared = []
    for stage, plan, peft_config, train, held_out in sources:
        tokenizer = load_tokenizer(stage.tokenizer, trust_remote_code=stage.config.trust_remote_code)
        train_examples = examples_of(stage.config, train, tokenizer, need_response=plan.needs_response)
        eval_examples = examples_of(stage.config, held_out, tokenizer, need_response=True) if held_out else None
        prepared.append(Prepared(stage, plan, peft_config, train_examples, eval_examples))
    return prepared


def examples_of(
    config: RunConfig, rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, *, need_response: bool
) -> list[Example]:
    """The rows as examples under the run's limits; raises UserError that lists the bad ones."""
    arguments = config.arguments()
    return to_examples(
        rows,
        tokenizer,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_new_tokens,
        need_response=need_response,
        skip_bad_rows=arguments.skip_bad_rows,
    ).examples


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


def _train_stage(one: Prepared, run: RunConfig, console: Console, is_main_process: bool, resume: bool) -> None:
    stage, config = one.stage, one.stage.config
    with console.status(f"loading {config.student} ..."):
        trainer, stopper, progress = _trainer(one, run, console)
    checkpoint = last_complete_checkpoint(stage.folder) if resume else None
    if is_main_process:
        # Not before everything has been loaded: a folder that says "run" is refused to the next attempt.
        record_run(run)
        console.print(_first_line(trainer, stage, checkpoint), highlight=False, markup=False, soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        progress.close()
        raise Stopped(_how_to_resume(run, stage, f"stopped at once, after step {trainer.state.global_step}")) from None
    finally:
        progress.close()
        stopper.close()
    if stopper.stopped:
        step = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        raise Stopped(_how_to_resume(run, stage, f"stopped after step {step}"))
    if is_main_process:
        model: Any = trainer.pair.student
        save_final(model if one.peft_config is None else model.merge_and_unload(), trainer.pair.tokenizer, stage)
    # The next stage reads what was saved.
    trainer.accelerator.wait_for_everyone()


def _trainer(one: Prepared, run: RunConfig, console: Console) -> tuple[SwitchTrainer, StopCleanly, ConsoleProgress]:
    config = one.stage.config
    pair = load_pair(
        config.student,
        config.teacher if one.plan.needs_teacher and config.teacher != SELF else None,
        dtype=config.dtype,
        teacher_dtype=config.teacher_dtype,
        teacher_quantization=config.teacher_quantization,
        trust_remote_code=config.trust_remote_code,
        student_drop_layers=config.student_drop_layers,
    )
    stopper, progress = StopCleanly(console), ConsoleProgress(console)
    trainer = SwitchTrainer(
        model=pair.student,
        teacher_model=SELF if config.teacher == SELF else pair.teacher,
        args=config.arguments(),
        train_dataset=one.train,
        eval_dataset=one.eval,
        processing_class=pair.tokenizer,
        peft_config=one.peft_config,
        callbacks=[LogFile(Path(run.output_dir) / LOG_FILE, one.stage.name), progress, stopper],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, stopper, progress


def _first_line(trainer: SwitchTrainer, stage: Stage, checkpoint: Path | None) -> str:
    starts = f"; goes on from {checkpoint}" if checkpoint else ""
    return f"{trainer.describe()}; writes to {stage.model_folder}{starts}; how long it takes is known after the first step."


def _how_to_resume(run: RunConfig, stage: Stage, what: str) -> str:
    kept = last_complete_checkpoint(stage.folder)
    keeps = f"{kept} is kept" if kept else "there is no checkpoint yet"
    place = f" of stage {stage.name}" if stage.name else ""
    return f"{what}{place}: {keeps}; go on with: switchkd train {Path(run.output_dir) / RUN_FILE} --resume"
