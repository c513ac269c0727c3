"""From a data set of any accepted shape to prompts and responses as token ids."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from switchkd.errors import UserError
from switchkd.records import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
FILE_FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BAD_ROWS_SHOWN = 20
Message = Mapping[str, str]


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: its columns, its index there from 0, and where a person finds it.

    `problem` says why the row could not be read. Its columns are then empty.
    """

    columns: Mapping[str, Any]
    index: int
    where: str
    problem: str = ""


@dataclass(frozen=True)
class RowText:
    """What a row says: a prompt (text or chat messages), and its references, the first of which is trained on."""

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
    """The examples of a source, in its order, and the rows that were left out."""

    examples: list[Example]
    skipped: list[BadRow]


class _BadRowError(Exception):
    """Why one row cannot be used."""


# ------ sources


def read_rows(source: str | Path | Iterable[Mapping[str, Any]], split: str = "train") -> list[SourceRow]:
    """The rows of a source, in order. Only that each is an object is checked here.

    A source is a .jsonl, .jsonl.gz, .json (a list) or .parquet file, a list of dicts or a `datasets.Dataset`, or else
    the name of a data set for `datasets.load_dataset`, of which `split` is taken. A row that is not JSON or no object has
    a `problem`. Raises UserError where the whole source cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return _rows_from_objects(source, "row")
    path = Path(source)
    if not is_data_file(path):
        return load_hub_rows(str(source), split)
    try:
        has_lines = path.suffix in (".jsonl", ".gz")
        return _rows_from_lines(path) if has_lines else _rows_from_objects(_read_table(path), f"{path}, row")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as {''.join(path.suffixes)}: {error}") from error


def is_data_file(path: Path) -> bool:
    """Whether a path has the ending of a format that is read without `datasets`."""
    return path.name.endswith(FILE_FORMATS)


def load_hub_rows(name: str, split: str, data_file: str | None = None) -> list[SourceRow]:
    """The rows of a split of a hub data set or local data set folder. Raises UserError where it cannot be loaded."""
    # Slow to import, and most sources are files.
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, data_files=data_file)
    except (OSError, ValueError) as error:
        not_a_file = f"{name!r} is not a file of a known format ({', '.join(FILE_FORMATS)})"
        raise UserError(f"{not_a_file}, and its split {split!r} cannot be loaded as a data set: {error}") from error
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


# ------ shapes


def _from_messages(columns: Mapping[str, Any]) -> RowText:
    *earlier, last = messages = _chat(columns["messages"], "messages")
    return RowText(earlier, (last["content"],)) if last["role"] == "assistant" else RowText(messages, ())


def _from_prompt(columns: Mapping[str, Any]) -> RowText:
    prompt, completion = columns["prompt"], columns.get("completion", "")
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


# The first line whose columns a row has says how the row is read. A prompt alone comes after all shapes with an answer.
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
        # A mistyped column would be ignored in silence, as other columns (ids, sources) rightly are.
        meant = get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.85)
        if meant and meant[0] not in row.columns:
            raise _BadRowError(f"unknown column {name!r}; did you mean {meant[0]!r}?")
    for needed, read in SHAPES:
        if all(name in row.columns for name in needed):
            text = read(row.columns)
            if not text.prompt or (isinstance(text.prompt, str) and not text.prompt.strip()):
                raise _BadRowError("empty prompt")
            return RowText(text.prompt, tuple(answer for answer in text.references if answer.strip()))
    raise _missing("prompt", row)


def row_text(row: SourceRow) -> RowText:
    """What a row says. Raises UserError where it has none of the accepted shapes."""
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


def _missing(what: str, row: SourceRow) -> _BadRowError:
    columns = ", ".join(row.columns) or "(none)"
    return _BadRowError(f"no {what} in the columns {columns}; accepted are {ACCEPTED_SHAPES}")


# ------ token ids


def render_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as text; chat messages go through the tokenizer's template. Raises UserError where it has none."""
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise UserError("the rows hold chat messages, but the tokenizer has no chat template; set one, or use text")
    return str(tokenizer.apply_chat_template(list(map(dict, prompt)), tokenize=False, add_generation_prompt=True))


def to_examples(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    need_response: bool,
    skip_bad_rows: bool = False,
) -> Loaded:
    """The rows as examples. A prompt's id is the row's index in the source, so that a skipped row moves no noise.

    No special token is added to the prompt (a chat template brings its own). The response is the first reference and
    the end-of-text token, cut after `max_response_tokens`. A row is bad if it cannot be read, if its prompt is longer
    than `max_prompt_tokens`, or if it has no response where `need_response`. Raises one UserError that lists all bad
    rows, or with `skip_bad_rows` logs and returns them. Source: the preprocessing of MiniLLM and DistiLLM, which drop or
    cut an over-long prompt.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set its eos_token, else no response can end")
    rendered, examples, bad = list[_Rendered](), list[Example](), list[BadRow]()
    for row in rows:
        try:
            text = _parse(row)
            if need_response and not text.references:
                raise _missing("response", row)
            prompt, response = render_prompt(text.prompt, tokenizer), next(iter(text.references), "")
            rendered.append(_Rendered(row, prompt, response, is_chat=not isinstance(text.prompt, str)))
        except (_BadRowError, TemplateError) as error:
            bad.append(BadRow(row.index, row.where, str(error)))
    for row, prompt_ids, response_ids in _tokenize(rendered, tokenizer):
        if len(prompt_ids) > max_prompt_tokens:
            reason = f"the prompt has {len(prompt_ids)} tokens; the limit is {max_prompt_tokens}"
            bad.append(BadRow(row.index, row.where, reason))
        else:
            examples.append(Example(Prompt(tuple(prompt_ids), row.index), tuple(response_ids[:max_response_tokens])))
    bad.sort(key=lambda row: row.index)
    _report(bad, len(rows), skip_bad_rows)
    return Loaded(examples, bad)


class _Rendered(NamedTuple):
    row: SourceRow
    prompt: str
    response: str
    is_chat: bool


def _tokenize(
    rendered: list[_Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[SourceRow, list[int], list[int]]]:
    end_ids = {is_chat: _end_id(tokenizer, is_chat) for is_chat in {each.is_chat for each in rendered}}
    prompts = _token_ids(tokenizer, [each.prompt for each in rendered])
    wholes = _token_ids(tokenizer, [each.prompt + each.response for each in rendered])
    for each, prompt, whole in zip(rendered, prompts, wholes, strict=True):
        response = whole[len(prompt) :]
        # A token that spans the seam makes the tail another text, and no generated response has such a token.
        if whole[: len(prompt)] != prompt:
            response = _token_ids(tokenizer, [each.response])[0]
        yield each.row, prompt, [*response, end_ids[each.is_chat]] if each.response else []


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False silences a warning about texts that are longer than the context: callers cut or refuse them.
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def _end_id(tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> int:
    """The token that ends a response: in a chat, what its template writes after the assistant's words."""
    end_of_text: int = tokenizer.eos_token_id
    if not is_chat:
        return end_of_text
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    _, said, after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("answer")
    written = _token_ids(tokenizer, [after])[0] if said else []
    return next((token for token in written if token in tokenizer.all_special_ids), end_of_text)


def _report(bad: list[BadRow], total: int, skip_bad_rows: bool) -> None:
    if not total:
        raise UserError(f"the data set has no rows; give one with rows of the shape {ACCEPTED_SHAPES}")
    shown = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:BAD_ROWS_SHOWN])
    more = f"\n  and {len(bad) - BAD_ROWS_SHOWN} more" if len(bad) > BAD_ROWS_SHOWN else ""
    listing = f"{len(bad)} of {total} rows cannot be used:{shown}{more}"
    if bad and not skip_bad_rows:
        ways_out = "Correct them, or leave them out with --skip-bad-rows (skip_bad_rows: true in a run file)."
        raise UserError(f"{listing}\n{ways_out}")
    if len(bad) == total:
        raise UserError(f"{listing}\nNo row is left; give rows of the shape {ACCEPTED_SHAPES}.")
    if bad:
        logging.getLogger(__name__).warning(listing)
