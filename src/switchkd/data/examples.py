"""From what rows say to prompts and responses as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from rich.console import Console

from switchkd.data.faults import BadRow, Faults
from switchkd.data.packed import PackedExamples
from switchkd.data.rows import SourceRow
from switchkd.data.shapes import BadRowError, RowText, called_tools, missing, parse
from switchkd.errors import UserError
from switchkd.models.chat import (
    TEMPLATE_ERRORS,
    Message,
    begun,
    end_of_turn,
    leading_ids,
    plain_ids,
    render,
    shared_start,
    special_ids,
)
from switchkd.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text in memory at a time: a tokenizer is as fast on this many as on all.
_ROWS_AT_A_TIME = 2000
# From some seconds on, people want to see that something happens.
_MANY_ROWS = 20_000
AddBos = Literal["auto", "always", "never"]
TrainTurns = Literal["last", "all"]


@dataclass(frozen=True)
class Rendering:
    """How rows become token ids.

    `template_kwargs` go to the chat template, below those that a row brings. `add_bos` says whether a prompt that is text begins
    with what the tokenizer puts before one ("auto"), with its begin-of-text token ("always") or with itself ("never"); a chat
    begins as its template says. `train_turns` "all" makes an example of each of the assistant's turns. `prompts_alone` leaves the
    responses out. Where there are `teachers`, a row's column `teacher_column` names one of them, unless its source does. Raises
    UserError for values out of range.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_bos: AddBos = "auto"
    train_turns: TrainTurns = "last"
    prompts_alone: bool = False
    teacher_column: str = "teacher"
    teachers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, choices in (("add_bos", AddBos), ("train_turns", TrainTurns)):
            if getattr(self, key) not in get_args(choices):
                raise UserError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(get_args(choices))}")

    def teacher_of(self, row: SourceRow) -> str:
        """The name of the row's teacher, "" where there is one for all. Raises BadRowError for one that is not known."""
        if not self.teachers:
            return ""
        named = row.teacher or row.columns.get(self.teacher_column)
        known = f"the run's teachers are {', '.join(self.teachers)}"
        if named is None:
            raise BadRowError(f"no column {self.teacher_column!r} names its teacher; {known}")
        if named not in self.teachers:
            raise BadRowError(f"{self.teacher_column} is {str(named)[:40]!r}, but {known}")
        return str(named)

    def leading_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What a prompt that is text begins with. Raises UserError where the tokenizer has no token to begin a text."""
        if self.add_bos != "always":
            return leading_ids(tokenizer) if self.add_bos == "auto" else []
        if tokenizer.bos_token_id is None:
            raise UserError("add_bos is always, but the tokenizer has no begin-of-text token; take auto or never")
        return [tokenizer.bos_token_id]


@dataclass(frozen=True)
class Loaded:
    """The examples of a source, in its order, and the rows that were left out."""

    examples: PackedExamples
    skipped: list[BadRow]


def to_examples(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    need_response: bool,
    skip_bad_rows: bool = False,
    rendering: Rendering = Rendering(),
) -> Loaded:
    """The rows as examples. A prompt's id is the row's index in the source, so that a skipped row moves no noise.

    Where `need_response`, the response is the first reference and the end-of-text token, cut after `max_response_tokens`; else
    it is empty. In a chat, prompt and response together are the whole conversation as the template writes it, up to the token
    that ends the turn. A row is bad if it cannot be read, if its prompt is longer than `max_prompt_tokens`, or if it has no
    response where `need_response`. Raises one UserError that lists all bad rows, or with `skip_bad_rows` logs and returns
    them. What was ignored or cut is logged. Source: the preprocessing of MiniLLM and DistiLLM, which drop or cut an over-long
    prompt.

    Memory holds the token ids, and some rows at a time. Of a row's copies, the first has the row's index as its prompt's id,
    and each next one an id that is larger by the number of rows.
    """
    if not need_response:
        rendering = replace(rendering, prompts_alone=True)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set its eos_token, else no response can end")
    made = _Making(tokenizer, rendering, Faults(len(rows), max_prompt_tokens, max_response_tokens), need_response)
    unread = iter(rows)
    shown = None if len(rows) >= _MANY_ROWS else False
    with progress_bar(Console(stderr=True), shown) as progress:
        task = progress.add_task("tokenizing", total=len(rows))
        while some := list(islice(unread, _ROWS_AT_A_TIME)):
            made.add([row for row in some if row.copies])
            progress.advance(task, len(some))
    made.faults.report(len(made.examples), skip_bad_rows)
    return Loaded(made.examples, made.faults.bad)


@dataclass(frozen=True)
class _Making:
    """The examples made so far, and what was wrong."""

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    faults: Faults
    need_response: bool
    examples: PackedExamples = field(default_factory=PackedExamples)

    def add(self, rows: Sequence[SourceRow]) -> None:
        """Make the examples of some rows."""
        faults = self.faults
        for row, prompt_ids, response_ids in _tokenize(self._rendered(rows), self.tokenizer, self.rendering):
            if faults.fits(row, len(prompt_ids), len(response_ids)):
                copies = [row.index + copy * faults.rows for copy in range(row.copies)]
                response_ids = response_ids[: faults.max_response_tokens]
                self.examples.add(copies, prompt_ids, response_ids, self.rendering.teacher_of(row))

    def _rendered(self, rows: Sequence[SourceRow]) -> list[_Rendered]:
        rendered = list[_Rendered]()
        for row in rows:
            try:
                text = parse(row)
                self.rendering.teacher_of(row)
                if self.need_response and not text.references:
                    raise missing("response", row)
                of_row = list(_rendered(row, text, self.tokenizer, self.rendering))
            except BadRowError as error:
                self.faults.add(row, str(error), error.kind)
                continue
            self.faults.ignored.update(text.ignored)
            self.faults.answers += len(of_row)
            self.faults.unopened.update(each.unopened for each in of_row if each.unopened)
            rendered += of_row
        return rendered


# ------ text


class _Rendered(NamedTuple):
    """A row's prompt and response as text. In a chat, `said` are the assistant's words inside the response.

    `unopened` is what the template opens an answer with when it is served, and leaves out of this finished one.
    """

    row: SourceRow
    prompt: str
    response: str
    said: str | None = None
    unopened: str = ""


def prompt_text(text: RowText, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = Rendering()) -> str:
    """What a row asks, as text; chat messages go through the template. Raises UserError where the tokenizer has none."""
    if isinstance(text.prompt, str):
        return text.prompt
    return _Template(text, tokenizer, rendering)(text.prompt, opens_answer=True)


def _rendered(
    row: SourceRow, text: RowText, tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[_Rendered]:
    """The row's prompt and response; with all turns to train on, one of each for every answer of the assistant."""
    if isinstance(text.prompt, str):
        yield _Rendered(row, text.prompt, "" if rendering.prompts_alone else next(iter(text.references), ""))
        return
    messages = [*text.prompt, *([text.answer] if text.answer and not rendering.prompts_alone else [])]
    turns = [len(text.prompt)]
    if rendering.train_turns == "all":
        turns = [turn for turn in range(1, len(messages)) if messages[turn]["role"] == "assistant"] or turns
    for turn in turns:
        try:
            yield _turn(row, messages[: turn + 1], turn, _Template(text, tokenizer, rendering))
        except UserError:
            # A ValueError too, and not the row's.
            raise
        except (*TEMPLATE_ERRORS, ValueError) as error:
            raise BadRowError(f"the chat template cannot write it: {error}") from error


class _Template(NamedTuple):
    """A chat template as one row calls it."""

    text: RowText
    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering

    def __call__(self, messages: Sequence[Message], *, opens_answer: bool) -> str:
        template_kwargs = {**self.rendering.template_kwargs, **self.text.template_kwargs}
        tools = self.text.tools
        return render(messages, self.tokenizer, opens_answer=opens_answer, tools=tools, template_kwargs=template_kwargs)


def _turn(row: SourceRow, messages: Sequence[Message], turn: int, template: _Template) -> _Rendered:
    """The conversation up to the answer at `turn`, and what the template makes of that answer, if it is there."""
    served = template(messages[:turn], opens_answer=True)
    _check_written(messages[turn - 1], served)
    if turn == len(messages):
        return _Rendered(row, served, "", said="")
    whole = template(messages, opens_answer=False)
    prompt = served
    if not whole.startswith(served):
        # Such as DeepSeek-R1's, which opens an answer with a thought and writes the finished one without it.
        prompt = shared_start(served, whole)
        if not prompt.startswith(template(messages[:turn], opens_answer=False)):
            raise BadRowError("the chat template writes its messages differently once the answer is there")
    response = whole[len(prompt) :]
    said = _check_written(messages[turn], response)
    return _Rendered(row, prompt, response, said, unopened=served[len(prompt) :])


def _check_written(message: Message, written: str) -> str:
    """The words of a message; raises BadRowError where a template leaves out what a user or the assistant says."""
    # Templates may set thoughts apart, or leave them out.
    said: str = message["content"].rpartition("</think>")[2].strip()
    # What a tool says and what a developer asks for are words to answer too. A system's may be joined to the user's.
    if message["role"] != "system" and said not in written:
        raise BadRowError(f"the chat template leaves out the words of the {message['role']}, {said[:40]!r}")
    # Else an answer that only calls a tool would be an empty one.
    for name in called_tools(message):
        if name not in written:
            raise BadRowError(
                f"the chat template leaves out the call of {name!r}; leave tool_calls out, or set template_from"
            )
    return said


# ------ token ids


def _tokenize(
    rendered: list[_Rendered], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> Iterator[tuple[SourceRow, list[int], list[int]]]:
    end_of_chat = end_of_turn(tokenizer) if any(each.said is not None for each in rendered) else None
    if end_of_chat is None:
        # What a template writes after the words, such as a line end, is not what ends the turn.
        rendered = [_up_to_the_words(each) for each in rendered]
    leading = rendering.leading_ids(tokenizer)
    prompts = plain_ids(tokenizer, [each.prompt for each in rendered])
    # Of prompts alone there is nothing more to tokenize, and most of the time of many rows goes here.
    answered = any(each.response for each in rendered)
    wholes = plain_ids(tokenizer, [each.prompt + each.response for each in rendered]) if answered else prompts
    for each, prompt, whole in zip(rendered, prompts, wholes, strict=True):
        response = whole[len(prompt) :]
        # A token that spans the seam makes the tail another text, and no generated response has such a token.
        if whole[: len(prompt)] != prompt:
            (response,) = plain_ids(tokenizer, [each.response])
        if each.said is None:
            prompt = begun(prompt, leading)
            ended = [*response, tokenizer.eos_token_id]
        else:
            ended = _up_to_the_end(response, tokenizer, end_of_chat)
        yield each.row, prompt, ended if each.response else []


def _up_to_the_end(response: list[int], tokenizer: PreTrainedTokenizerBase, end: int | None) -> list[int]:
    """A chat's response up to the token that ends the turn, or with it where the template wrote none."""
    if end in response:
        return response[: len(response) - response[::-1].index(end)]
    # After a call of tools, some write another one.
    ends_itself = response[-1:] and response[-1] in special_ids(tokenizer)
    return response if ends_itself else [*response, tokenizer.eos_token_id if end is None else end]


def _up_to_the_words(each: _Rendered) -> _Rendered:
    if not each.said:
        return each
    return each._replace(response=each.response[: each.response.rindex(each.said) + len(each.said)])
