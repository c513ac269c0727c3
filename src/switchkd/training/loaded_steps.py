"""The rows of the optimizer steps that are written at once (`rollout_steps`): how many steps, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from transformers import TrainerState, TrainingArguments

from switchkd.records import Example


class LoadedStep(NamedTuple):
    """The micro-batches of a step, as the loader gave them, and their rows without those that fill up its last batch.

    Where the last micro-batch has no other rows, `fillers` is one whose text counts nowhere: the other processes have rows, and
    wait for this one's gradient.
    """

    batches: Sequence[Sequence[Example]]
    rows: Sequence[Example]
    fillers: Sequence[Example]


def steps_at_once(rollout_steps: int, state: TrainerState, args: TrainingArguments) -> int:
    """The number of steps to write now: up to the next multiple of `rollout_steps`, of a checkpoint or evaluation, or the end.

    So a run that goes on from a checkpoint writes what it would have written without a break, by the same student.
    """
    ends = [state.max_steps]
    due = ((args.save_strategy, state.save_steps), (args.eval_strategy, state.eval_steps))
    for every in (rollout_steps, *(steps for strategy, steps in due if strategy == "steps")):
        ends.append((state.global_step // every + 1) * every)
    return min(ends) - state.global_step


def loaded_steps(
    batches: Iterator[Sequence[Example]],
    steps: int,
    batches_a_step: int,
    without_repeats: Callable[[Sequence[Example]], Sequence[Example]],
) -> list[LoadedStep]:
    """What the loader gives for the next `steps`; fewer where its epoch ends."""
    found = []
    for _ in range(steps):
        loaded: list[Sequence[Example]] = []
        rows: list[Example] = []
        last: Sequence[Example] = ()
        for batch in islice(batches, batches_a_step):
            loaded.append(batch)
            # Asked here, since the loader says that a batch is the last one only until it is asked for the next.
            last = without_repeats(batch)
            rows += last
        if not loaded:
            break
        found.append(LoadedStep(loaded, rows, () if last else (replace(loaded[-1][0], response_ids=()),)))
    return found
