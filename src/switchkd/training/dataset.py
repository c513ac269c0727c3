"""The data set of a trainer: rows or records in, checked examples out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from switchkd.data.examples import to_examples
from switchkd.data.packed import PackedExamples, lengths_of, teachers_of
from switchkd.data.rows import Rows, SourceRow, read_rows
from switchkd.data.shapes import has_answers, is_chat, row_text
from switchkd.errors import UserError
from switchkd.evaluation.measures import scores_named
from switchkd.methods.config import SwitchConfig
from switchkd.models.chat import warn_of_other_template
from switchkd.records import Example
from switchkd.training.taught import Taught, first_pair, named

_log = logging.getLogger(__name__)


def training_examples(dataset: Any, taught: Mapping[str, Taught], args: SwitchConfig) -> Any:
    """The examples of a training set: `Example` records, or rows as `read_rows` takes them, tokenized. None stays None.

    Warns of a teacher that no row names. Raises UserError for rows that cannot be used, for a missing response where the method
    needs one, and for several sets.
    """
    if isinstance(dataset, Mapping):
        names = ", ".join(map(str, dataset))
        first = next(iter(dataset), "train")
        raise UserError(
            f"train_dataset is a {type(dataset).__name__} of {names}; pass one of them, such as ds[{first!r}]"
        )
    need_response = args.plan.needs_response
    if dataset is None:
        return None
    if isinstance(dataset, PackedExamples) or _has_records(dataset):
        examples = _checked_records(dataset, need_response=need_response)
    else:
        rows, tokenizer = _rows_of(dataset), _tokenizer_of(taught)
        for each in taught.values():
            warn_of_templates(rows, tokenizer, each.pair.teacher_tokenizer, args)
        examples = tokenized(rows, tokenizer, args, need_response=need_response, teachers=named(taught))
    asked = _checked_teachers(examples, taught)
    if unused := [name for name in named(taught) if name not in asked]:
        _log.warning(
            f"no row of the training data names the teacher {' or '.join(unused)}, which takes part in nothing"
        )
    return examples


def evaluation_examples(dataset: Any, taught: Mapping[str, Taught], args: SwitchConfig) -> Any:
    """The examples of an evaluation set, or of each in a mapping. None stays None.

    A set without any response is evaluated on the student's own text. Raises UserError for rows that cannot be used.
    """
    if isinstance(dataset, Mapping):
        return {name: evaluation_examples(part, taught, args) for name, part in dataset.items()}
    if dataset is None:
        return None
    if isinstance(dataset, PackedExamples) or _has_records(dataset):
        _checked_teachers(dataset, taught)
    if isinstance(dataset, PackedExamples):
        return dataset
    if _has_records(dataset):
        if args.eval_scores:
            raise UserError("eval_scores compares text, but eval_dataset holds Example records; give rows")
        answered = any(response for _, response in lengths_of(dataset))
        _check_answered(answered, args)
        return _checked_records(dataset, need_response=answered)
    return evaluated(_rows_of(dataset), _tokenizer_of(taught), args, named(taught))


def _checked_teachers(examples: Sequence[Example], taught: Mapping[str, Taught]) -> set[str]:
    """The names of the teachers that the examples ask for. Raises UserError for one that is not there."""
    asked = teachers_of(examples)
    if unknown := sorted(asked - taught.keys()):
        known = ", ".join(named(taught))
        remedy = f"one of {known}" if known else "nothing, or give a teacher_model of several, {name: model}"
        raise UserError(
            f"an example names the teacher {unknown[0]!r}, which is not there; set Prompt.teacher to {remedy}"
        )
    return asked


def evaluated(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, args: SwitchConfig, teachers: Sequence[str] = ()
) -> PackedExamples:
    """The rows of an evaluation set as examples, with their references where answers are scored.

    Either all rows need a response or, where none has one, none does. Raises UserError for rows that cannot be used.
    """
    answered = has_answers(rows)
    _check_answered(answered, args)
    examples = tokenized(rows, tokenizer, args, need_response=answered, teachers=teachers)
    if scores := scores_named(args.eval_scores):
        comparing = [score.name for score in scores if score.of_references]
        if comparing and not answered:
            raise UserError(
                f"eval_scores has {comparing[0]}, which compares with answers, but no row of the evaluation data has one; give "
                f"rows with answers, or a function of your own, module:FUNCTION"
            )
        used = {example.prompt.prompt_id for example in examples}
        examples.references = {
            row.index + copy * len(rows): row_text(row).references
            for row in rows
            if row.index in used
            for copy in range(row.copies)
        }
    return examples


def _check_answered(answered: bool, args: SwitchConfig) -> None:
    if not answered and args.plan.objective.divergence is None:
        raise UserError(
            f"no row of the evaluation data has a response, and {args.method_name} compares the student with nothing else; give "
            f"rows with answers"
        )
    if not answered and not all(weight.trains_on("student") for weight in args.plan.objective.weights):
        raise UserError(
            "no row of the evaluation data has a response, so the student's own text is evaluated, but a weight leaves its tokens "
            "out, and the loss would be 0; give rows with answers"
        )


def _has_records(dataset: Any) -> bool:
    return not isinstance(dataset, str | Path | Rows) and len(_sized(dataset)) > 0 and isinstance(dataset[0], Example)


def _sized(dataset: Any) -> Any:
    if hasattr(dataset, "__len__"):
        return dataset
    raise UserError(
        f"the data set is a {type(dataset).__name__}, whose rows cannot be counted; give a datasets.Dataset or a list (of a "
        f"stream, list(stream.take(1000))), or stream a hub set from a run file"
    )


def _rows_of(dataset: Any) -> Rows:
    return read_rows(dataset if isinstance(dataset, str | Path) else _sized(dataset))


def _checked_records(dataset: Sequence[Example], *, need_response: bool) -> Sequence[Example]:
    lengths = list(lengths_of(dataset))
    empty = sum(not response for _, response in lengths)
    if need_response and empty:
        raise UserError(f"{empty} of {len(lengths)} examples have no response; give their response_ids")
    if not all(prompt for prompt, _ in lengths):
        raise UserError(
            "an example has no prompt, but its first token has to be predicted from something; give prompt tokens"
        )
    return dataset if isinstance(dataset, PackedExamples) else list(dataset)


def _tokenizer_of(taught: Mapping[str, Taught]) -> PreTrainedTokenizerBase:
    tokenizer = first_pair(taught).tokenizer
    if tokenizer is None:
        raise UserError("the rows are text, but there is no tokenizer; give processing_class")
    return tokenizer


def warn_of_templates(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    args: SwitchConfig,
) -> None:
    """Warn, where rows are chats, of a teacher with another template than the tokenizer's."""
    templates = tokenizer.chat_template and teacher_tokenizer is not None and teacher_tokenizer.chat_template
    if templates and teacher_tokenizer is not None and any(map(is_chat, rows)):
        warn_of_other_template(tokenizer, teacher_tokenizer, args.rendering.template_kwargs)


def tokenized(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    args: SwitchConfig,
    *,
    need_response: bool,
    teachers: Sequence[str] = (),
) -> PackedExamples:
    """The rows as examples within the run's limits, each with the one of `teachers` that it names, if there are any.

    Raises UserError that lists the bad rows.
    """
    return to_examples(
        rows,
        tokenizer,
        max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_new_tokens,
        need_response=need_response,
        skip_bad_rows=args.skip_bad_rows,
        rendering=replace(args.rendering, teachers=tuple(teachers)),
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
