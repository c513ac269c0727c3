"""From a data set of any accepted shape to prompts and responses as token ids."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from switchkd.errors import UserError
from switchkd.records import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The templates of MiniLLM and DistiLLM; the response follows directly, then the end-of-text token.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ACCEPTED_SHAPES = "prompt/completion (or prompt alone), messages, or instruction/input/output"
BAD_ROWS_SHOWN = 20

Message = Mapping[str, str]


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: its columns, its index there from 0, and where a person finds it.

    `problem` says why the row could not be read; its columns are then empty.
    """

    columns: Mapping[str, Any]
    index: int
    where: str
    problem: str = ""


@dataclass(frozen=True)
class RowText:
    """What a row says: a prompt (text or chat messages), and its references, of which the first is trained on."""

    prompt: str | list[Message]
    references: tuple[str, ...]


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    index: int
    where: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The examples of a source in its order, and the rows that were left out (none unless that was asked for)."""

    examples: list[Example]
    skipped: list[BadRow]


class _BadRowError(Exception):
    """Why one row cannot be used."""


# ---------------------------------------------------------------- sources


def read_rows(source: str | Path | Iterable[Mapping[str, Any]], split: str = "train") -> list[SourceRow]:
    """Return the rows of a source, in order, unchecked but for being JSON objects.

    A source is a .jsonl, .jsonl.gz, .json (a list) or .parquet file, a list of dicts or a `datasets.Dataset`, or else
    the name of a data set for `datasets.load_dataset`, of which `split` is taken. Raises UserError where the whole
    source cannot be read; a line that is not JSON becomes a row with a `problem`.
    """
    if not isinstance(source, (str, Path)):
        return _rows_from_objects(source, "row")
    path = Path(source)
    if not is_data_file(path):
        return load_hub_rows(str(source), split)
    try:
        if path.suffix in (".jsonl", ".gz"):
            return _rows_from_lines(path)
        return _rows_from_objects(_read_table(path), f"{path}, row")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as {''.join(path.suffixes)}: {error}") from error


def is_data_file(path: Path) -> bool:
    """Return whether a path has the ending of a format that is read without `datasets`."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet"))


def load_hub_rows(name: str, split: str, data_file: str | None = None) -> list[SourceRow]:
    """Return the rows of a split of a hub data set or local data set folder; raises UserError where there is none."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, data_files=data_file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is no file that can be read here (.jsonl, .jsonl.gz, .json, .parquet), and its split {split!r} "
            f"cannot be loaded as a data set: {error}"
        ) from error
    return _rows_from_objects(dataset, f"{name} {split}, row")


def _rows_from_objects(objects: Iterable[Any], origin: str) -> list[SourceRow]:
    return [_source_row(value, index, f"{origin} {index}") for index, value in enumerate(objects)]


def _rows_from_lines(path: Path) -> list[SourceRow]:
    rows: list[SourceRow] = []
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            index, where = len(rows), f"{path}:{number}"
            try:
                rows.append(_source_row(json.loads(line), index, where))
            except ValueError as error:
                rows.append(SourceRow({}, index, where, f"not JSON: {error}"))
    return rows


def _read_table(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_table(path).to_pylist())
    objects = json.loads(path.read_bytes())
    if not isinstance(objects, list):
        raise ValueError(f"it holds a JSON {_kind(objects)}, not a list of objects")
    return objects


def _source_row(value: Any, index: int, where: str) -> SourceRow:
    if not isinstance(value, Mapping):
        return SourceRow({}, index, where, f"{_kind(value)} instead of an object with columns")
    # Arrow gives every row every column and fills what a row lacks with None.
    return SourceRow({name: entry for name, entry in value.items() if entry is not None}, index, where)


# ---------------------------------------------------------------- shapes


def _from_messages(columns: Mapping[str, Any]) -> RowText:
    messages = _chat(columns["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        return RowText(messages[:-1], (messages[-1]["content"],))
    return RowText(messages, ())


def _from_prompt(columns: Mapping[str, Any]) -> RowText:
    prompt = columns["prompt"]
    completion = columns.get("completion", "")
    if isinstance(completion, list):
        answer = _chat(completion, "completion")
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise _BadRowError("completion has to be one assistant message")
        completion = answer[0]["content"]
    prompt = _chat(prompt, "prompt") if isinstance(prompt, list) else _text(prompt, "prompt")
    return RowText(prompt, (_text(completion, "completion"),))


def _from_instruction(columns: Mapping[str, Any]) -> RowText:
    instruction, context = _text(columns["instruction"], "instruction"), _text(columns.get("input", ""), "input")
    if not instruction.strip():
        raise _BadRowError("empty instruction")
    output = columns.get("output", "")
    references = tuple(_text(text, "output") for text in (output if isinstance(output, list) else [output]))
    template = ALPACA_WITH_INPUT if context else ALPACA
    return RowText(template.format(instruction=instruction, input=context), references)


# The first line whose columns a row has, tells how it is read; a prompt alone comes after what also has an answer.
SHAPES = (
    (("messages",), _from_messages),
    (("prompt", "completion"), _from_prompt),
    (("instruction", "output"), _from_instruction),
    (("prompt",), _from_prompt),
    (("instruction",), _from_instruction),
)
KNOWN_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output")


def _parse(row: SourceRow) -> RowText:
    if row.problem:
        raise _BadRowError(row.problem)
    for name in row.columns:
        # A mistyped column would be left out without a word; other columns (ids, sources) are nobody's business.
        meant = get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.85)
        if meant and meant[0] not in row.columns:
            raise _BadRowError(f"unknown column {name!r}; did you mean {meant[0]!r}?")
    for needed, read in SHAPES:
        if all(name in row.columns for name in needed):
            text = read(row.columns)
            if not text.prompt or (isinstance(text.prompt, str) and not text.prompt.strip()):
                raise _BadRowError("empty prompt")
            return RowText(text.prompt, tuple(answer for answer in text.references if answer.strip()))
    raise _BadRowError(f"no prompt in the columns {_names(row)}; accepted are {ACCEPTED_SHAPES}")


def row_text(row: SourceRow) -> RowText:
    """Return what a row says; raises UserError where it has none of the accepted shapes."""
    try:
        return _parse(row)
    except _BadRowError as error:
        raise UserError(f"{row.where}: {error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{name} is {_kind(value)}, not text")
    return value


def _chat(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"{name} is {'an empty list' if value == [] else _kind(value)}, not a list of chat messages")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise _BadRowError(f"{name} holds {_kind(message)} that is not a message with role and content")
        _text(message["content"], f"the content of a message in {name}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _names(row: SourceRow) -> str:
    return ", ".join(row.columns) or "(none)"


# ---------------------------------------------------------------- token ids


def render_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as text: as it is, or through the tokenizer's chat template up to the assistant's turn.

    Raises UserError where there are messages but no chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise UserError("the rows hold chat messages but the tokenizer has no chat template; set one, or use text")
    messages = [dict(message) for message in prompt]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def to_examples(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    need_response: bool,
    skip_bad_rows: bool = False,
) -> Loaded:
    """Return the rows as examples; a prompt's id is the row's index in the source, so a skipped row moves no noise.

    No special token is added to the prompt (a chat template brings its own). The response is the first reference and
    the end-of-text token, cut after `max_response_tokens`. A prompt that is longer than `max_prompt_tokens`, or has no
    response where `need_response`, makes a row bad, like any row that cannot be read. Raises one UserError that lists
    the bad rows before anything else is done with the good ones; with `skip_bad_rows` they are logged and returned.
    Source: the preprocessing of MiniLLM and DistiLLM, which drop or cut an over-long prompt.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set its eos_token, else no response can end")
    rendered, unreadable = _render(rows, tokenizer, need_response)
    examples, too_long = _tokenise(rendered, tokenizer, max_prompt_tokens, max_response_tokens)
    bad = sorted(unreadable + too_long, key=lambda row: row.index)
    _report(bad, len(rows), skip_bad_rows)
    return Loaded(examples, bad)


@dataclass(frozen=True)
class _Rendered:
    row: SourceRow
    prompt: str
    response: str
    is_chat: bool


def _render(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, need_response: bool
) -> tuple[list[_Rendered], list[BadRow]]:
    rendered, bad = [], []
    for row in rows:
        try:
            text = _parse(row)
            if need_response and not text.references:
                raise _BadRowError(f"no response in the columns {_names(row)}; accepted are {ACCEPTED_SHAPES}")
            prompt, response = render_prompt(text.prompt, tokenizer), next(iter(text.references), "")
            rendered.append(_Rendered(row, prompt, response, is_chat=not isinstance(text.prompt, str)))
        except (_BadRowError, TemplateError) as error:
            bad.append(BadRow(row.index, row.where, str(error)))
    return rendered, bad


def _tokenise(
    rendered: list[_Rendered], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int
) -> tuple[list[Example], list[BadRow]]:
    end_ids = {is_chat: _end_id(tokenizer, is_chat) for is_chat in {one.is_chat for one in rendered}}
    prompt_ids = _token_ids(tokenizer, [one.prompt for one in rendered])
    whole_ids = _token_ids(tokenizer, [one.prompt + one.response for one in rendered])
    examples, bad = [], []
    for one, prompt, whole in zip(rendered, prompt_ids, whole_ids, strict=True):
        row, answer = one.row, list[int]()
        if len(prompt) > max_prompt_tokens:
            reason = f"the prompt has {len(prompt)} tokens; the limit is {max_prompt_tokens}"
            bad.append(BadRow(row.index, row.where, reason))
            continue
        if one.response:
            # Where a token spans the seam, the tail is not the response, and a generated response never has that token.
            seam_is_clean = whole[: len(prompt)] == prompt
            answer = whole[len(prompt) :] if seam_is_clean else _token_ids(tokenizer, [one.response])[0]
            answer = [*answer, end_ids[one.is_chat]][:max_response_tokens]
        examples.append(Example(Prompt(tuple(prompt), row.index), tuple(answer)))
    return examples, bad


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: what is longer than the model's context is cut or refused by the caller.
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def _end_id(tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> int:
    """Return the token that ends a response: of a chat, what its template writes after the assistant's words."""
    end_of_text: int = tokenizer.eos_token_id
    if not is_chat:
        return end_of_text
    words = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": words}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = _token_ids(tokenizer, [text[text.rindex(words) + len(words) :]])[0]
    return next((token for token in after if token in tokenizer.all_special_ids), end_of_text)


def _report(bad: list[BadRow], total: int, skip_bad_rows: bool) -> None:
    if not total:
        raise UserError(f"the data set has no rows; give one with rows of the shape {ACCEPTED_SHAPES}")
    if not bad:
        return
    lines = [f"{len(bad)} of {total} rows cannot be used:"]
    lines += [f"  {row.where}: {row.reason}" for row in bad[:BAD_ROWS_SHOWN]]
    if len(bad) > BAD_ROWS_SHOWN:
        lines.append(f"  and {len(bad) - BAD_ROWS_SHOWN} more")
    listing = "\n".join(lines)
    if not skip_bad_rows:
        raise UserError(
            f"{listing}\nCorrect them, or leave them out with --skip-bad-rows (skip_bad_rows: true in a run file)."
        )
    if len(bad) == total:
        raise UserError(f"{listing}\nNo row is left; give rows of the shape {ACCEPTED_SHAPES}.")
    logger.warning(listing)
