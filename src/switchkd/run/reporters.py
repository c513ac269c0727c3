"""Rollouts as the reporters show them that a run's `report_to` names: text in TensorBoard, tables in trackio and wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from switchkd.records import Rollout
from switchkd.report.terminal import TEACHER_MARKS, rollout_text, writer_runs

if TYPE_CHECKING:
    from pandas import DataFrame

_NAME = "rollouts"


def send_rollouts(
    callbacks: Sequence[TrainerCallback],
    rollouts: Sequence[Rollout],
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Hand rollouts and their lines of rollouts.jsonl to each reporter among the trainer's callbacks that takes text or tables."""
    if not records:
        return
    step = records[0]["step"]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            texts = [rollout_text(rollout, tokenizer, color=False).plain for rollout in rollouts]
            # It reads Markdown, which leaves an indented block as it is.
            callback.tb_writer.add_text(_NAME, "\n\n".join(indent(text, "    ") for text in texts), step)
        elif isinstance(callback, WandbCallback | TrackioCallback):
            # Only the callback knows the package, which is imported where it is installed.
            package = getattr(callback, "_wandb" if isinstance(callback, WandbCallback) else "_trackio", None)
            if package is not None:
                table = package.Table(dataframe=_table(rollouts, records, tokenizer))
                package.log({_NAME: table, "train/global_step": step})


def _table(
    rollouts: Sequence[Rollout], records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> DataFrame:
    """A row for each rollout; in its response, marks stand around what the teacher wrote."""
    from pandas import DataFrame

    opening, closing = TEACHER_MARKS
    marked = [
        "".join(f"{opening}{run}{closing}" if by_teacher else run for run, by_teacher in writer_runs(each, tokenizer))
        for each in rollouts
    ]
    return DataFrame(
        [
            {
                "stage": record["stage"],
                "step": record["step"],
                "prompt": record["prompt"],
                "response": response,
                "teacher_share": record["teacher_share"],
                "tokens": len(record["token_ids"]),
                "divergence": _mean([value for value in record["divergence"] if value is not None]),
                "ended_by": record["finish_reason"],
            }
            for record, response in zip(records, marked, strict=True)
        ]
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
