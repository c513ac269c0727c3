"""What student and teacher write while a run trains: a few rollouts in the terminal, in a file and in the reporters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.records import Prompt, Rollout
from switchkd.report.terminal import print_rollouts
from switchkd.rollout.jsonl import rollout_record
from switchkd.rollout.second_reading import SecondReading
from switchkd.run.reporters import send_rollouts
from switchkd.run.written import read_lines
from switchkd.training.trainer import SwitchTrainer
from switchkd.training.written_step import WrittenStep

SHOWN_ROLLOUTS = 2


class RolloutView(TrainerCallback):
    """Shows the first rollouts of a step, every `show_rollouts_every` steps from the first on.

    On the console in color, in the file as JSON lines with stage and step and both models' favorites, and where the run reports,
    as text or as a table. Into the file and the tables go the prompts that were shown first, too, written again with the
    same draws, so that one text can be compared from step to step.
    """

    def __init__(self, trainer: SwitchTrainer, console: Console, path: Path, stage: str) -> None:
        self.trainer = trainer
        self.console = console
        self.path = path
        self.stage = stage
        # By step: several may be written at once.
        self.read: dict[int, list[tuple[Rollout, SecondReading]]] = {}
        self.followed: list[Prompt] | None = None

    def _is_shown(self, step: int) -> bool:
        every = self.trainer.args.show_rollouts_every
        return every > 0 and (step - 1) % every == 0 and self.trainer.pair.tokenizer is not None

    def on_written(self, written: WrittenStep) -> None:
        """Read some of a step's rollouts again, while both models still are as they were."""
        if not (self._is_shown(written.step) and self.trainer.is_world_process_zero()):
            return
        prompts = [rollout.prompt for rollout in written.rollouts[:SHOWN_ROLLOUTS]]
        if self.followed is None:
            self.followed = self._followed_before() or prompts
        others = [each for each in self.followed if each not in prompts]
        self.read[written.step] = written.read_again(SHOWN_ROLLOUTS, others)

    def _followed_before(self) -> list[Prompt]:
        """The prompts that a run which now goes on has followed so far."""
        kept = [line for line in read_lines(self.path) if line.get("stage") == self.stage]
        first = [line for line in kept if line["step"] == kept[0]["step"]]
        return [
            Prompt(
                tuple(each["prompt_token_ids"]), each["prompt_id"], each["sample_id"], teacher=each.get("teacher", "")
            )
            for each in first
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show those of the step that has just ended."""
        newest, tokenizer = self.trainer.newest_rollouts, self.trainer.pair.tokenizer
        shown = self._is_shown(state.global_step) and state.is_world_process_zero
        if not (shown and newest and tokenizer is not None):
            return
        self.console.print(f"Written in step {state.global_step}:", highlight=False)
        print_rollouts(newest, tokenizer, self.console, shown=SHOWN_ROLLOUTS)
        read = self.read.pop(state.global_step, [])
        records = self._records(read, tokenizer, state.global_step)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        send_rollouts(self.trainer.callback_handler.callbacks, [each for each, _ in read], records, tokenizer)

    def _records(
        self, read: Sequence[tuple[Rollout, SecondReading]], tokenizer: PreTrainedTokenizerBase, step: int
    ) -> Sequence[dict[str, Any]]:
        followed = set(self.followed or ())
        return [
            {
                "stage": self.stage,
                "step": step,
                "followed": rollout.prompt in followed,
                **rollout_record(rollout, tokenizer, reading),
            }
            for rollout, reading in read
        ]
