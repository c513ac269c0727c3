"""What student and teacher write while a run trains: a few rollouts in the terminal, in a file and in the reporter."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from switchkd.report.terminal import print_rollouts, rollout_text
from switchkd.rollout.jsonl import rollout_record
from switchkd.training.trainer import SwitchTrainer

SHOWN_ROLLOUTS = 2


class RolloutView(TrainerCallback):
    """Shows the first rollouts of a step, every `show_rollouts_every` steps from the first on; nothing is generated for it.

    On the console in color, in the file as JSON lines with stage and step, and in TensorBoard, where it reports, as text.
    """

    def __init__(self, trainer: SwitchTrainer, console: Console, path: Path, stage: str) -> None:
        self.trainer = trainer
        self.console = console
        self.path = path
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show those of the step that has just ended."""
        every = self.trainer.args.show_rollouts_every
        written, tokenizer = self.trainer.newest_rollouts, self.trainer.pair.tokenizer
        first_or_later = every > 0 and (state.global_step - 1) % every == 0
        if not (first_or_later and written and tokenizer is not None and state.is_world_process_zero):
            return
        self.console.print(f"Written in step {state.global_step}:", highlight=False)
        print_rollouts(written, tokenizer, self.console, shown=SHOWN_ROLLOUTS)
        rollouts = written[:SHOWN_ROLLOUTS]
        records = [rollout_record(rollout, tokenizer) for rollout in rollouts]
        with self.path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **record}) + "\n")
        texts = [rollout_text(rollout, tokenizer, color=False).plain for rollout in rollouts]
        for callback in self.trainer.callback_handler.callbacks:
            writer = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
            if writer is not None:
                # It reads Markdown, which leaves an indented block as it is.
                writer.add_text("rollouts", "\n\n".join(indent(text, "    ") for text in texts), state.global_step)
