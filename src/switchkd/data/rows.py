"""From a data set of any accepted shape to what its rows say."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from switchkd.errors import UserError
from switchkd.models.chat import Message

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
    """What a row says: a prompt (text or chat messages), and its references, the first of which is trained on.

    In a chat, `answer` is the assistant's message that the first reference is, and `tools` and `template_kwargs` go to the
    chat template. `ignored` names columns that people know from elsewhere, and that say nothing here.
    """

    prompt: str | list[Message]
    references: tuple[str, ...]
    answer: Message | None = None
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class BadRowError(Exception):
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

    from switchkd.models.hub import UNREACHABLE, offline_at_once

    offline = not Path(name).exists() and offline_at_once()
    try:
        dataset = datasets.load_dataset(name, split=split, data_files=data_file)
    except (OSError, ValueError) as error:
        if offline:
            raise UserError(
                f"{name!r} is no file or folder here, {UNREACHABLE}; check the name, or set --data-dir or SWITCHKD_DATA_DIR"
            ) from error
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
    return _of_chat(earlier, last, columns) if last["role"] == "assistant" else _of_chat(messages, None, columns)


def _from_prompt(columns: Mapping[str, Any]) -> RowText:
    prompt, completion = columns["prompt"], columns.get("completion", "")
    if isinstance(completion, list):
        answer = _chat(completion, "completion")
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise BadRowError("completion has to be one assistant message")
    else:
        answer = [{"role": "assistant", "content": _text(completion, "completion")}]
    if isinstance(prompt, list):
        return _of_chat(_chat(prompt, "prompt"), answer[0], columns)
    return RowText(_text(prompt, "prompt"), (answer[0]["content"],))


def _of_chat(prompt: list[Message], answer: Message | None, columns: Mapping[str, Any]) -> RowText:
    tools, template_kwargs = columns.get("tools"), columns.get("chat_template_kwargs", {})
    if isinstance(tools, str) and tools:
        # Data sets in which each row has other tools hold them as text.
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRowError(f"tools is text that is not JSON: {error}") from None
    if not (tools is None or isinstance(tools, list)):
        raise BadRowError(f"tools is {_kind(tools)}, not a list of tools")
    if not isinstance(template_kwargs, Mapping):
        raise BadRowError(f"chat_template_kwargs is {_kind(template_kwargs)}, not a mapping")
    said = "" if answer is None else answer["content"] or json.dumps(answer.get("tool_calls") or "").strip('"')
    return RowText(prompt, (said,), answer if said.strip() else None, tools or None, template_kwargs)


def _from_instruction(columns: Mapping[str, Any]) -> RowText:
    instruction, context = _text(columns["instruction"], "instruction"), _text(columns.get("input", ""), "input")
    if not instruction.strip():
        raise BadRowError("empty instruction")
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
_OF_CHAT = ("tools", "chat_template_kwargs")
KNOWN_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", *_OF_CHAT)
# What other tools read. The prompt beside an instruction is MiniLLM's rendering of it, and loses nothing.
_READ_ELSEWHERE = ("chosen", "rejected", "system", "history", "images")
_READ_BY = {
    _from_messages: ("messages", *_OF_CHAT),
    _from_prompt: ("prompt", "completion", *_OF_CHAT),
    _from_instruction: ("instruction", "input", "output", "prompt"),
}


def parse(row: SourceRow) -> RowText:
    """What a row says. Raises BadRowError, with the reason alone, where it has none of the accepted shapes."""
    if row.problem:
        raise BadRowError(row.problem)
    for name in row.columns:
        # A mistyped column would be ignored in silence, as other columns (ids, sources) rightly are.
        meant = get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.85)
        if meant and meant[0] not in row.columns:
            raise BadRowError(f"unknown column {name!r}; did you mean {meant[0]!r}?")
    for needed, read in SHAPES:
        if all(name in row.columns for name in needed):
            text = read(row.columns)
            if not text.prompt or (isinstance(text.prompt, str) and not text.prompt.strip()):
                raise BadRowError("empty prompt")
            known = [name for name in (*KNOWN_COLUMNS, *_READ_ELSEWHERE) if row.columns.get(name)]
            is_read = [name for name in _READ_BY[read] if name not in _OF_CHAT or not isinstance(text.prompt, str)]
            return replace(
                text,
                references=tuple(answer for answer in text.references if answer.strip()),
                ignored=tuple(name for name in known if name not in is_read),
            )
    raise missing("prompt", row)


def row_text(row: SourceRow) -> RowText:
    """What a row says. Raises UserError where it has none of the accepted shapes."""
    try:
        return parse(row)
    except BadRowError as error:
        raise UserError(f"{row.where}: {error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_kind(value)}, not text")
    return value


def _chat(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} is {'an empty list' if value == [] else _kind(value)}, not a list of chat messages")
    return [_message(each, name) for each in value]


def _message(value: Any, name: str) -> Message:
    # Arrow gives every message all keys that any has.
    message = {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else {}
    # A call of tools needs no words.
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if not {"role", "content"} <= message.keys():
        raise BadRowError(f"{name} holds {_kind(value)} that is not a message with role and content")
    _text(message["content"], f"the content of a message in {name}")
    return message


def is_chat(row: SourceRow) -> bool:
    """Whether a row holds chat messages."""
    return any(isinstance(row.columns.get(name), list) for name in ("messages", "prompt"))


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def missing(what: str, row: SourceRow) -> BadRowError:
    """The reason that a row has no `what`, naming its columns."""
    columns = ", ".join(row.columns) or "(none)"
    return BadRowError(f"no {what} in the columns {columns}; accepted are {ACCEPTED_SHAPES}")
