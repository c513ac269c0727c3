"""What a row says: the shapes that rows may have, and why one cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from switchkd.data.rows import SourceRow, kind_of
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
ACCEPTED_SHAPES = "prompt/completion (or prompt alone), messages, conversations, or instruction/input/output"
# Who speaks in ShareGPT's conversations, as the roles of a chat template.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


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
    """Why one row cannot be used. `kind` is the reason without what other rows of the same fault have otherwise."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind or reason


# ------ shapes


def _from_messages(columns: Mapping[str, Any]) -> RowText:
    *earlier, last = messages = _chat(columns["messages"], "messages")
    return _of_chat(earlier, last, columns) if last["role"] == "assistant" else _of_chat(messages, None, columns)


def _from_conversations(columns: Mapping[str, Any]) -> RowText:
    messages = _chat(columns["conversations"], "conversations")
    if columns.get("system"):
        messages = [{"role": "system", "content": _text(columns["system"], "system")}, *messages]
    return _from_messages({**columns, "messages": messages})


def _from_prompt(columns: Mapping[str, Any]) -> RowText:
    prompt, completion = columns["prompt"], columns.get("completion", "")
    if isinstance(prompt, str) and isinstance(completion, list) and completion and isinstance(completion[0], str):
        return RowText(_text(prompt, "prompt"), tuple(_text(text, "completion") for text in completion))
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
            raise BadRowError(f"tools is text that is not JSON: {error}", "tools is text that is not JSON") from None
    if not (tools is None or isinstance(tools, list)):
        raise _wrong("tools", tools, "a list of tools")
    if not isinstance(template_kwargs, Mapping):
        raise _wrong("chat_template_kwargs", template_kwargs, "a mapping")
    tools, template_kwargs = _without_nulls(tools), _without_nulls(template_kwargs)
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
    (("conversations",), _from_conversations),
    (("prompt", "completion"), _from_prompt),
    (("instruction", "output"), _from_instruction),
    (("prompt",), _from_prompt),
    (("instruction",), _from_instruction),
)
_OF_CHAT = ("tools", "chat_template_kwargs")
KNOWN_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", *_OF_CHAT, "conversations")
# Other sets have a conversation_id or the like beside a shape of ours.
_OFTEN_MISTYPED = KNOWN_COLUMNS[:-1]
# What other tools read.
_READ_ELSEWHERE = ("chosen", "rejected", "system", "history", "images")
READ_BY = {
    _from_messages: ("messages", *_OF_CHAT),
    _from_conversations: ("conversations", "system", *_OF_CHAT),
    _from_prompt: ("prompt", "completion", *_OF_CHAT),
    _from_instruction: ("instruction", "input", "output"),
}


def parse(row: SourceRow) -> RowText:
    """What a row says. Raises BadRowError, with the reason alone, where it has none of the accepted shapes."""
    if row.problem:
        raise BadRowError(row.problem, row.problem.partition(":")[0])
    for name in row.columns:
        # A mistyped column would be ignored in silence, as other columns (ids, sources) rightly are.
        meant = _meant(name)
        if meant and meant not in row.columns:
            raise BadRowError(f"unknown column {name!r}; did you mean {meant!r}?")
    for needed, read in SHAPES:
        if all(name in row.columns for name in needed):
            text = read(row.columns)
            if not text.prompt or (isinstance(text.prompt, str) and not text.prompt.strip()):
                raise BadRowError("empty prompt")
            known = [name for name in (*KNOWN_COLUMNS, *_READ_ELSEWHERE) if row.columns.get(name)]
            # The prompt beside an instruction is MiniLLM's rendering of it, and loses nothing.
            reads = (*READ_BY[read], "prompt") if read is _from_instruction else READ_BY[read]
            is_read = [name for name in reads if name not in _OF_CHAT or not isinstance(text.prompt, str)]
            return replace(
                text,
                references=tuple(answer for answer in text.references if answer.strip()),
                ignored=tuple(name for name in known if name not in is_read),
            )
    raise missing("prompt", row)


@cache
def _meant(column: str) -> str | None:
    return next(iter(get_close_matches(column, _OFTEN_MISTYPED, n=1, cutoff=0.85)), None)


def has_answers(rows: Iterable[SourceRow]) -> bool:
    """Whether any row brings a response."""
    return any((text := _read(row)) is not None and text.references for row in rows)


def is_readable(row: SourceRow) -> bool:
    """Whether a row has one of the accepted shapes."""
    return _read(row) is not None


def _read(row: SourceRow) -> RowText | None:
    try:
        return parse(row)
    except BadRowError:
        return None


def row_text(row: SourceRow) -> RowText:
    """What a row says. Raises UserError where it has none of the accepted shapes."""
    try:
        return parse(row)
    except BadRowError as error:
        raise UserError(f"{row.where}: {error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{name} holds half of a character (a lone surrogate), which no tokenizer takes") from None
    return value


def _wrong(name: str, value: Any, expected: str) -> BadRowError:
    kind = "null" if value is None else type(value).__name__
    return BadRowError(f"{name} is {kind_of(value)}, not {expected}", f"{name} is {kind}, not {expected}")


def _chat(value: Any, name: str) -> list[Message]:
    if value == []:
        raise BadRowError(f"{name} is an empty list, not a list of chat messages")
    if not isinstance(value, list):
        raise _wrong(name, value, "a list of chat messages")
    return [_message(each, name) for each in value]


def _message(value: Any, name: str) -> Message:
    message = _without_nulls(value) if isinstance(value, Mapping) else {}
    if "from" in message and "value" in message:
        message = {"role": _role(message.pop("from"), name), "content": message.pop("value"), **message}
    # A call of tools needs no words.
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if not {"role", "content"} <= message.keys():
        reason = "that is not a message with role and content"
        raise BadRowError(f"{name} holds {kind_of(value)} {reason}", f"{name} holds something {reason}")
    _text(message["content"], f"the content of a message in {name}")
    return message


def called_tools(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    return [str(call["name"]) for call in calls if isinstance(call, Mapping) and call.get("name")]


def _without_nulls(value: Any) -> Any:
    """The value without what is null in its mappings: Arrow gives each of them the keys that any has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _role(speaker: Any, name: str) -> str:
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise BadRowError(f"{name} has a message from {speaker!r}; known are {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker]


def is_chat(row: SourceRow) -> bool:
    """Whether a row holds chat messages."""
    return any(isinstance(row.columns.get(name), list) for name in ("messages", "conversations", "prompt"))


def missing(what: str, row: SourceRow) -> BadRowError:
    """The reason that a row has no `what`, naming its columns."""
    return BadRowError(f"no {what} in the columns {', '.join(row.columns) or '(none)'}")
