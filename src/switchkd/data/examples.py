"""From what rows say to prompts and responses as token ids."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from switchkd.data.rows import ACCEPTED_SHAPES, BadRowError, RowText, SourceRow, missing, parse
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
from switchkd.records import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD_ROWS_SHOWN = 20
_log = logging.getLogger(__name__)
AddBos = Literal["auto", "always", "never"]
TrainTurns = Literal["last", "all"]


@dataclass(frozen=True)
class Rendering:
    """How rows become token ids.

    `template_kwargs` go to the chat template, below those that a row brings. `add_bos` says whether a prompt that is text begins
    with what the tokenizer puts before one ("auto"), with its begin-of-text token ("always") or with itself ("never"); a chat
    begins as its template says. `train_turns` "all" makes an example of each of the assistant's turns. `prompts_alone` leaves the
    responses out. Raises UserError for values out of range.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_bos: AddBos = "auto"
    train_turns: TrainTurns = "last"
    prompts_alone: bool = False

    def __post_init__(self) -> None:
        for key, choices in (("add_bos", AddBos), ("train_turns", TrainTurns)):
            if getattr(self, key) not in get_args(choices):
                raise UserError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(get_args(choices))}")

    def leading_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What a prompt that is text begins with. Raises UserError where the tokenizer has no token to begin a text."""
        if self.add_bos != "always":
            return leading_ids(tokenizer) if self.add_bos == "auto" else []
        if tokenizer.bos_token_id is None:
            raise UserError("add_bos is always, but the tokenizer has no begin-of-text token; take auto or never")
        return [tokenizer.bos_token_id]


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
    """
    if not need_response:
        rendering = replace(rendering, prompts_alone=True)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set its eos_token, else no response can end")
    rendered, bad = _render_all(rows, tokenizer, rendering, need_response)
    examples, lengths, cut = list[Example](), list[int](), list[int]()
    for row, prompt_ids, response_ids in _tokenize(rendered, tokenizer, rendering):
        lengths.append(len(prompt_ids))
        if len(prompt_ids) > max_prompt_tokens:
            # Of several turns that are too long, the first speaks for the row.
            if not bad or bad[-1].index != row.index:
                reason = f"the prompt has {len(prompt_ids)} tokens; the limit is {max_prompt_tokens}"
                bad.append(BadRow(row.index, row.where, reason))
        else:
            cut.append(len(response_ids))
            examples.append(Example(Prompt(tuple(prompt_ids), row.index), tuple(response_ids[:max_response_tokens])))
    bad.sort(key=lambda row: row.index)
    _report(
        bad, len(rows), len(examples), skip_bad_rows, _kept_by_limits("max_prompt_tokens", max_prompt_tokens, lengths)
    )
    _warn_of_unopened_answers(rendered)
    _warn_of_cuts(max_response_tokens, cut)
    return Loaded(examples, bad)


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


def _render_all(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, rendering: Rendering, need_response: bool
) -> tuple[list[_Rendered], list[BadRow]]:
    """The rows as text, and those that cannot be used. Columns that nothing reads are logged."""
    rendered, bad, ignored = list[_Rendered](), list[BadRow](), Counter[str]()
    for row in rows:
        try:
            text = parse(row)
            if need_response and not text.references:
                raise missing("response", row)
            rendered += _rendered(row, text, tokenizer, rendering)
            ignored.update(text.ignored)
        except BadRowError as error:
            bad.append(BadRow(row.index, row.where, str(error)))
    _warn_of_ignored_columns(ignored, len(rows))
    return rendered, bad


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
        except TEMPLATE_ERRORS as error:
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
    if message["role"] in ("user", "assistant") and said not in written:
        raise BadRowError(f"the chat template leaves out the words of the {message['role']}, {said[:40]!r}")
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
    wholes = plain_ids(tokenizer, [each.prompt + each.response for each in rendered])
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


# ------ what was left out, ignored or cut


def _report(bad: list[BadRow], total: int, left: int, skip_bad_rows: bool, limits: str) -> None:
    if not total:
        raise UserError(f"the data set has no rows; give one with rows of the shape {ACCEPTED_SHAPES}")
    shown = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:BAD_ROWS_SHOWN])
    more = f"\n  and {len(bad) - BAD_ROWS_SHOWN} more" if len(bad) > BAD_ROWS_SHOWN else ""
    listing = f"{len(bad)} of {total} rows cannot be used:{shown}{more}{limits}"
    if bad and not skip_bad_rows:
        ways_out = "Correct them, or leave them out with --skip-bad-rows (skip_bad_rows: true in a run file)."
        raise UserError(f"{listing}\n{ways_out}")
    if not left:
        raise UserError(f"{listing}\nNo row is left; give rows of the shape {ACCEPTED_SHAPES}.")
    if bad:
        _log.warning(listing)


def _kept_by_limits(setting: str, limit: int, lengths: Sequence[int]) -> str:
    """A line that says how many of the lengths a limit keeps, and what larger ones would; "" where it keeps all."""
    kept = sum(length <= limit for length in lengths)
    if kept == len(lengths):
        return ""
    larger = list[tuple[int, int]]()
    while kept < len(lengths):
        # The next power of two.
        limit_there = 1 << (larger[-1][0] if larger else limit).bit_length()
        kept = sum(length <= limit_there for length in lengths)
        larger.append((limit_there, kept))
    would = ", ".join(f"{each:,} would keep {count:,}" for each, count in larger)
    return f"\n{setting} {limit:,} keeps {sum(length <= limit for length in lengths):,} of {len(lengths):,}; {would}."


def _warn_of_cuts(limit: int, lengths: Sequence[int]) -> None:
    if cut := sum(length > limit for length in lengths):
        _log.warning(
            f"{cut:,} of {len(lengths):,} responses ({cut / len(lengths):.0%}) are cut, and end without an end-of-text token."
            f"{_kept_by_limits('max_new_tokens', limit, lengths)}"
        )


def _warn_of_ignored_columns(ignored: Counter[str], rows: int) -> None:
    for column, count in ignored.items():
        _log.warning(f"{count:,} of {rows:,} rows have a column {column!r} that is not read beside their other columns")


def _warn_of_unopened_answers(rendered: Sequence[_Rendered]) -> None:
    unopened = [each.unopened for each in rendered if each.unopened]
    if unopened:
        _log.warning(
            f"{len(unopened):,} of {len(rendered):,} answers do not begin as they are served: the chat template opens an "
            f"answer with {unopened[0]!r}, and writes theirs without. They are trained as it writes them; "
            f"chat_template_kwargs, such as {{enable_thinking: false}}, may make the two agree"
        )
