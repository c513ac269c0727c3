"""The data set of a trainer: rows or records in, checked examples out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from switchkd.data.examples import to_examples
from switchkd.data.rows import SourceRow, is_chat, read_rows
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.chat import warn_of_other_template
from switchkd.models.pair import ModelPair
from switchkd.records import Example


def examples_of(
    dataset: Any, pair: ModelPair, args: SwitchConfig, *, need_response: bool, warn_of_template: bool = True
) -> Any:
    """The examples of a data set: `Example` records, or rows as `read_rows` takes them, tokenized. None stays None.

    A mapping of data sets gives a mapping. Raises UserError for rows that cannot be used, and for a missing response where
    `need_response`.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = dataset.items()
        rest = {"need_response": need_response, "warn_of_template": warn_of_template}
        return {name: examples_of(part, pair, args, **rest) for name, part in parts}
    if not isinstance(dataset, str | Path) and len(dataset) and isinstance(dataset[0], Example):
        empty = sum(not example.response_ids for example in dataset)
        if need_response and empty:
            raise UserError(f"{empty} of {len(dataset)} examples have no response; give their response_ids")
        if not all(example.prompt.token_ids for example in dataset):
            raise UserError(
                "an example has no prompt, but its first token has to be predicted from something; give prompt tokens"
            )
        return list(dataset)
    if pair.tokenizer is None:
        raise UserError("the rows are text, but there is no tokenizer; give processing_class")
    rows = read_rows(dataset)
    if warn_of_template:
        warn_of_templates(rows, pair.tokenizer, pair.teacher_tokenizer, args)
    return tokenized(rows, pair.tokenizer, args, need_response=need_response)


def warn_of_templates(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    args: SwitchConfig,
) -> None:
    """Warn, where rows are chats, of a teacher with another template than the tokenizer's."""
    if teacher_tokenizer is not None and any(map(is_chat, rows)):
        warn_of_other_template(tokenizer, teacher_tokenizer, args.rendering.template_kwargs)


def tokenized(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, args: SwitchConfig, *, need_response: bool
) -> list[Example]:
    """The rows as examples within the run's limits; raises UserError that lists the bad ones."""
    return to_examples(
        rows,
        tokenizer,
        max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_new_tokens,
        need_response=need_response,
        skip_bad_rows=args.skip_bad_rows,
        rendering=args.rendering,
    ).examples


def with_row_numbers(examples: list[Example]) -> dict[str, Any]:
    """The loader's batch: the records themselves, since a rollout may take the place of one."""
    # The evaluation loop counts the rows of a batch by its first tensor.
    return {"examples": examples, "rows": torch.arange(len(examples))}


def without_repeats(examples: Sequence[Example], rows: int, process: int, processes: int) -> Sequence[Example]:
    """The examples of a process's last batch that no other batch of the epoch has; `rows` is the data set's length.

    accelerate fills the last batches of all processes up with rows from the start of the epoch, so that all are of one size.
    """
    # A single process's last batch may be smaller.
    left = rows % (len(examples) * processes) if processes > 1 else 0
    return examples[: max(0, left - process * len(examples))] if left else examples
