"""Conversations as text: a tokenizer's chat template, the token that ends a turn in it, and two templates compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from switchkd.errors import UserError

Message = Mapping[str, Any]

# What a template makes of messages or keywords that it was not written for.
TEMPLATE_ERRORS = (TemplateError, TypeError)

_SYSTEM = {"role": "system", "content": "Be brief."}
_QUESTION = {"role": "user", "content": "What is it?"}
_ANSWER = {"role": "assistant", "content": "Seventeen."}


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    opens_answer: bool,
    tools: Any = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the tokenizer's template writes it; with `opens_answer`, ready for the assistant's next words.

    `template_kwargs` are the template's own, such as Qwen3's `enable_thinking`. Raises UserError where there is no template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows hold chat messages, but the tokenizer has no chat template; set template_from to teacher or to a "
            "template file, or use text"
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=tools,
        tokenize=False,
        add_generation_prompt=opens_answer,
        **(template_kwargs or {}),
    )
    return cast(str, text)


def shared_start(one: str, other: str) -> str:
    """The text that both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in same)


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without anything that the tokenizer would put around it."""
    # verbose=False silences a warning about texts that are longer than the context: callers cut or refuse them.
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends the assistant's turn; None without a template, or where it writes none.

    It is the last of the special tokens that come next after the answer, at the end of a conversation as before a next
    question. Phi-3's template adds an end of text to the former alone; where the two share none, as in GPT-OSS, the end of
    the conversation decides. GLM's writes nothing there: its models end a turn with what opens the next one.
    """
    if not tokenizer.chat_template:
        return None
    turns = [_QUESTION, _ANSWER]
    try:
        at_end, within = (_ids_after_answer(each, tokenizer) for each in (turns, [*turns, _QUESTION]))
    except TEMPLATE_ERRORS:
        return None
    special = special_ids(tokenizer)
    shared = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], zip(at_end, within, strict=False))]
    for written in (shared, at_end, within):
        if run := list(takewhile(special.__contains__, dropwhile(lambda token: token not in special, written))):
            end_of_text = tokenizer.eos_token_id
            return end_of_text if end_of_text in run else run[-1]
    return None


def _ids_after_answer(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    _, said, after = render(messages, tokenizer, opens_answer=False).rpartition(_ANSWER["content"])
    return plain_ids(tokenizer, [after])[0] if said else []


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All special tokens, named ones and others."""
    # Phi-3's <|end|> is special, but none of the named ones that all_special_ids lists.
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added}


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, such as the token that begins one; often nothing."""
    (text,) = plain_ids(tokenizer, ["a"])
    whole = list(tokenizer("a")["input_ids"])
    starts = (start for start in range(len(whole)) if whole[start : start + len(text)] == text)
    return whole[: next(starts, 0)]


def begun(token_ids: Sequence[int], leading: Sequence[int]) -> list[int]:
    """A text's ids after the leading ones, which somebody may have written into it already; no text stays none."""
    is_begun = not token_ids or [*token_ids[: len(leading)]] == [*leading]
    return [*token_ids] if is_begun else [*leading, *token_ids]


def set_template(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None, template_from: str
) -> None:
    """Give the tokenizer, which is saved with the student, the chat template that `template_from` names.

    That is "student" (its own), "teacher", or the path of a file. Raises UserError where there is none.
    """
    if template_from == "student":
        return
    if template_from == "teacher":
        template = teacher_tokenizer.chat_template if teacher_tokenizer is not None else None
        if not template:
            raise UserError(
                "template_from is teacher, but no teacher brings a chat template; take student, or a template file"
            )
        tokenizer.chat_template = template
        return
    try:
        # Some editors begin a file with a byte-order mark, which would come before every prompt.
        tokenizer.chat_template = Path(template_from).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"template_from is {template_from!r}, which cannot be read as a template file ({error}); give student, teacher "
            f"or the path of a file"
        ) from error


def warn_of_other_template(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> None:
    """Warn where student and teacher would render one conversation differently, or read it as other ids, and show it."""
    if not tokenizer.chat_template or not teacher_tokenizer.chat_template:
        return
    if (difference := template_difference(tokenizer, teacher_tokenizer, template_kwargs)) is None:
        _warn_of_other_ids(tokenizer, teacher_tokenizer, template_kwargs)
        return
    ours, theirs = difference
    logging.getLogger(__name__).warning(
        f"the chat templates of student and teacher differ: where the one in use writes {ours!r}, the teacher's writes "
        f"{theirs!r}. The teacher is asked about text that it does not know; template_from: teacher takes its template"
    )


def _warn_of_other_ids(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> None:
    """Warn where the student's tokenizer does not have the marks of the template that both use."""
    try:
        text = render([_QUESTION, _ANSWER], tokenizer, opens_answer=False, template_kwargs=template_kwargs)
    except TEMPLATE_ERRORS:
        return
    ours, theirs = (plain_ids(each, [text])[0] for each in (tokenizer, teacher_tokenizer))
    if ours != theirs:
        logging.getLogger(__name__).warning(
            f"the student's tokenizer takes the marks of the chat template apart: a short conversation has {len(ours)} tokens, and "
            f"{len(theirs)} with the teacher's tokenizer. The teacher reads ids that it was not trained on; take a student whose "
            f"tokenizer has these marks, or a template file without them"
        )


def template_difference(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Where the renderings of a probe begin to differ, some forty characters of each; None where they do not."""
    with_system = [_SYSTEM, _QUESTION, _ANSWER, _QUESTION]
    # Some templates take no system message.
    for probe in (with_system, with_system[1:]):
        try:
            ours, theirs = (
                render(probe, each, opens_answer=True, template_kwargs=template_kwargs)
                for each in (tokenizer, teacher_tokenizer)
            )
        except TEMPLATE_ERRORS:
            continue
        if ours == theirs:
            return None
        start = max(0, len(shared_start(ours, theirs)) - 10)
        return ours[start : start + 40], theirs[start : start + 40]
    return None
