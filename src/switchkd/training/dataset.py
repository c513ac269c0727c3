"""The data set of a trainer: rows or records in, checked examples out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from switchkd.data.rows import SourceRow, read_rows, to_examples
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.records import Example


def examples_of(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: SwitchConfig, *, need_response: bool
) -> Any:
    """The examples of a data set: `Example` records, or rows as `read_rows` takes them, tokenized. None stays None.

    A mapping of data sets gives a mapping. Raises UserError for rows that cannot be used, and for a missing response where
    `need_response`.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = dataset.items()
        return {name: examples_of(part, tokenizer, args, need_response=need_response) for name, part in parts}
    if not isinstance(dataset, str | Path) and len(dataset) and isinstance(dataset[0], Example):
        empty = sum(not example.response_ids for example in dataset)
        if need_response and empty:
            raise UserError(f"{empty} of {len(dataset)} examples have no response; give their response_ids")
        if not all(example.prompt.token_ids for example in dataset):
            raise UserError(
                "an example has no prompt, but its first token has to be predicted from something; give prompt tokens"
            )
        return list(dataset)
    if tokenizer is None:
        raise UserError("the rows are text, but there is no tokenizer; give processing_class")
    return tokenized(read_rows(dataset), tokenizer, args, need_response=need_response)


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
