"""What a run shows and keeps while it trains, and how it stops when it is told to."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from rich.console import Console
from rich.progress import TaskID
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.models.pair import counted
from switchkd.progress import progress_bar
from switchkd.report.terminal import duration, scores_of
from switchkd.run.written import read_log as read_log

# What a progress line shows of a log event: its key, and how it is written.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "eval_rouge_l": "ROUGE-L {:.1f}",
    "eval_exact_match": "exact match {:.1f}",
    "eval_numeric_match": "numeric match {:.1f}",
    "threshold": "threshold {:.3g}",
    "teacher_share": "teacher {:.0%}",
    "budget_used": "budget {:.0%}",
    "response_tokens": "{:.0f} tokens",
    "rollout_tokens_per_second": "rollout {:,.0f} tok/s",
    "train_tokens_per_second": "train {:,.0f} tok/s",
}
# Elsewhere than on a terminal, a step that takes longer says how far it is.
_SECONDS_BETWEEN_LINES = 60.0


def measures(logs: Mapping[str, Any]) -> str:
    """The measures of one log event, in one line, the scores of one's own and those of several sets at its end."""
    ours = [form.format(float(logs[key])) for key, form in SHOWN.items() if key in logs]
    others = [key for key in scores_of(logs) if key not in SHOWN]
    return "  ".join([*ours, *(f"{key.removeprefix('eval_')} {float(logs[key]):.4g}" for key in others)])


class ConsoleProgress(TrainerCallback):
    """A live bar on a terminal, a line for each log event elsewhere; after the first step an estimate of the whole."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = progress_bar(console)
        self.task = TaskID(0)
        self.measured = ""
        self.substeps = 0
        self.started_at = self.told_at = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar."""
        self.started_at = time.perf_counter()
        self.first_step = state.global_step
        self.task = self.bar.add_task("step", total=state.max_steps, completed=state.global_step)
        if state.is_world_process_zero:
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; after the first step say how long the whole will take."""
        self.substeps = 0
        self.bar.note = self.measured
        self.bar.update(self.task, completed=state.global_step)
        # A resumed run starts at another step than 0.
        budgets = (getattr(args, "max_seconds", None), getattr(args, "max_generated_tokens", None))
        steps = state.max_steps - self.first_step
        # Their text is written at once, before the first of them.
        first = min(getattr(args, "rollout_steps", 1), steps)
        if state.global_step != self.first_step + first or not state.is_world_process_zero or any(budgets):
            return
        seconds = time.perf_counter() - self.started_at
        took = f"The first {counted(first, 'step') if first > 1 else 'step'} took {duration(seconds)}"
        self._print(f"{took}: about {duration(seconds / first * steps)} for {counted(steps, 'step')}.")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the step's training is."""
        self.substeps += 1
        self._tell(f"batch {self.substeps} of {args.gradient_accumulation_steps} trained")

    def on_rollouts(self, finished: int, total: int) -> None:
        """Show how far the step's rollouts are."""
        self._tell(f"{finished} of {total} rolled out")

    def _tell(self, part: str) -> None:
        """Show a part of a step: below the bar, or, where there is none, once a minute as a line."""
        if self.console.is_terminal:
            self.bar.note = f"{self.measured}  {part}".strip()
        now = time.perf_counter()
        since = now - max(self.told_at, self.started_at)
        if not self.console.is_terminal and since > _SECONDS_BETWEEN_LINES and PartialState().is_main_process:
            self.told_at = now
            self._print(f"step {int(self.bar.tasks[self.task].completed) + 1}: {part}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the measures of a log event."""
        logs: Mapping[str, Any] = kwargs["logs"]
        line = measures(logs)
        if not line or not state.is_world_process_zero:
            return
        # On a terminal each loss takes the place of the last; rarer events stay, as lines above the bar.
        if self.console.is_terminal and "loss" in logs:
            self.bar.note = self.measured = line
            return
        if "threshold" in logs:
            self._print(f"{state.global_step}/{state.max_steps}  {line}")
            if state.global_step == self.first_step:
                # The first step serves to estimate the whole, and a calibration before it is no part of a step.
                self.started_at = time.perf_counter()
            return
        elapsed = time.perf_counter() - self.started_at
        steps = max(1, state.global_step - self.first_step)
        left = elapsed / steps * (state.max_steps - state.global_step)
        if used := logs.get("budget_used"):
            left = min(left, elapsed * max(0, 1 / used - 1))
        self._print(
            f"{state.global_step}/{state.max_steps}  {line}  {duration(elapsed)} elapsed, about {duration(left)} left"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """End the live display, so that later lines are printed below it."""
        self.bar.stop()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class LogFile(TrainerCallback):
    """Appends each log event to a file, one JSON object per line, with stage, step and seconds since the start."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self.started_at = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the clock of a resumed run go on from its last line."""
        if state.global_step:
            lines = [event for event in read_log(self.path) if event.get("stage") == self.stage]
            self.started_at -= lines[-1]["seconds"] if lines else 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        event = {
            "stage": self.stage,
            "step": state.global_step,
            "seconds": round(time.perf_counter() - self.started_at, 3),
        }
        # Opened for each event, so that a crash loses none that came before it.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**event, **kwargs["logs"]}) + "\n")


class StopCleanly(TrainerCallback):
    """The first Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; a Ctrl-C after it raises KeyboardInterrupt.

    With `rollout_steps` it finishes the steps whose text is written.
    All processes of a run stop after the same step, whichever of them the signal reached. Afterwards `stopped` says whether
    training ended before its last step for this reason.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stop_requested = False
        self.stopped = False
        self._requested_at = 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over SIGINT and SIGTERM."""
        # Python lets no other thread set a handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._interrupted)

    def _interrupted(self, signal_number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            # torchrun passes on what the terminal has sent to its processes already.
            passed_on = torch.distributed.is_torchelastic_launched() and time.monotonic() - self._requested_at < 2
            if signal_number == signal.SIGINT and not passed_on:
                raise KeyboardInterrupt
            return
        self.stop_requested, self._requested_at = True, time.monotonic()
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        self.console.print(
            f"\n{name}: the run finishes what is written, saves a checkpoint and stops. Press Ctrl-C to stop at once."
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop after a signal to any process."""
        # Text that waits for its step would be lost, and a resumed run write other text in its place.
        is_used_up = state.global_step % getattr(args, "rollout_steps", 1) == 0
        # After the last step the run saves and ends in any case.
        if is_used_up and state.global_step < state.max_steps and _any_process(self.stop_requested):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        self.close()

    def close(self) -> None:
        """Give the signals back, also where training ended with an exception."""
        while self._before:
            signal.signal(*self._before.popitem())


def _any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: a process that stopped alone would leave the others waiting for it."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    flags: Tensor = gather(torch.tensor([flag], device=state.device))
    return bool(flags.any())
