"""A student and its teacher, checked to fit: shared ids, end-of-text and padding ids, heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.errors import UserError
from switchkd.models.chat import end_of_turn
from switchkd.models.heads import Head, base_of, head_rows


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A student, the teacher it learns from (None: the student alone) and the tokenizer they share.

    `tokenizer` is the student's; give `teacher_tokenizer` too if it was loaded separately. Vocabularies may differ in
    padding, see `vocabulary_size`. Weights of float32 compute in `autocast_dtype` if there is one; see `computing`.
    `tokenizers_agree` says that `check_tokenizers_agree` has passed already. Raises UserError
    if the tokenizers give a string different ids, or if a tokenizer belongs to another model.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    autocast_dtype: torch.dtype | None = None
    tokenizers_agree: InitVar[bool] = False

    def __post_init__(self, tokenizers_agree: bool) -> None:
        if self.tokenizer is None:
            return
        if self.teacher_tokenizer is not None and not tokenizers_agree:
            check_tokenizers_agree(self.tokenizer, self.teacher_tokenizer, self.vocabulary_size)
        for role, model in self.models.items():
            if self.tokenizer.vocab_size > head_rows(model):
                raise UserError(
                    f"the tokenizer knows {self.tokenizer.vocab_size} tokens but the {role} ({name_of(model)}) scores "
                    f"only {head_rows(model)}: they do not belong together; take a {role} of the tokenizer's family"
                )
        eos_id = self.tokenizer.eos_token_id
        if isinstance(eos_id, int) and eos_id >= self.vocabulary_size:
            raise UserError(
                f"the end-of-text token {self.tokenizer.eos_token!r} has id {eos_id}, but only ids below "
                f"{self.vocabulary_size} are known to both models, so no text could ever end; set the tokenizer's "
                f"eos_token to a token that both know"
            )

    def computing(self) -> AbstractContextManager[Any]:
        """The precision of whatever the two models compute: rollouts, scoring and loss run inside, so that they agree."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.student.device.type, dtype=self.autocast_dtype)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models by role: student, then the teacher if there is one."""
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    def swapped(self) -> ModelPair:
        """The same two models with their roles exchanged: the teacher then writes by itself, over the vocabulary they share."""
        if self.teacher is None:
            raise UserError("a pair without a teacher cannot be swapped; load one")
        return replace(self, student=self.teacher, teacher=self.student, tokenizers_agree=True)

    @cached_property
    def vocabulary_size(self) -> int:
        """The number of token ids that all models and tokenizers know; larger ids are excluded everywhere."""
        tokenizers = [tokenizer for tokenizer in (self.tokenizer, self.teacher_tokenizer) if tokenizer is not None]
        return min([*map(head_rows, self.models.values()), *map(id_count, tokenizers)])

    @cached_property
    def student_head(self) -> Head:
        """The student's head, cut to the shared vocabulary; proven once, see `Head.of`."""
        with self.computing():
            return Head.of(self.student, self.vocabulary_size)

    @cached_property
    def teacher_head(self) -> Head | None:
        """The teacher's head, cut to the shared vocabulary; None without a teacher."""
        with self.computing():
            return None if self.teacher is None else Head.of(self.teacher, self.vocabulary_size)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the student's, the teacher's, as `eos_ids_of` lists them, and the chat template's."""
        # Either model may end a text, so the ids of both count.
        found = [*eos_ids_of(self.student, self.tokenizer)]
        if self.teacher is not None:
            found += eos_ids_of(self.teacher, self.teacher_tokenizer)
        # A base model may know no end of a turn, and yet be taught in one.
        turn = None if self.tokenizer is None else end_of_turn(self.tokenizer)
        found += [] if turn is None else [turn]
        return tuple(token_id for token_id in dict.fromkeys(found) if 0 <= token_id < self.vocabulary_size)

    @cached_property
    def pad_id(self) -> int:
        """The id that fills up a row. Masks follow lengths, so it may be any id, even that of end-of-text."""
        configs = (self.student.generation_config, self.student.config)
        candidates = [getattr(source, "pad_token_id", None) for source in (self.tokenizer, *configs)]
        usable = (token_id for token_id in (*candidates, *self.eos_ids) if isinstance(token_id, int))
        return next((token_id for token_id in usable if 0 <= token_id < self.vocabulary_size), 0)

    def check_room(self, tokens: int) -> None:
        """Raise UserError if a sequence of `tokens`, prompt and response together, exceeds a model's positions."""
        for role, model in self.models.items():
            limit = position_limit(model)
            if limit is not None and tokens > limit:
                raise UserError(
                    f"prompt and response come to {tokens} tokens, but the {role}, {name_of(model)}, knows {limit} positions; "
                    f"lower max_new_tokens or max_prompt_tokens"
                )


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of positions that a model knows, or None if its configuration names none."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's largest id; more than its length if it skips ids."""
    return max(tokenizer.get_vocab().values()) + 1


def name_of(model: PreTrainedModel) -> str:
    """The name that a model was loaded by, or else its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[int]:
    """The end-of-text ids in a model's generation config, its config and its tokenizer, in that order."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        named = getattr(source, "eos_token_id", None)
        yield from named if isinstance(named, list | tuple) else () if named is None else (named,)


def rounded(count: float) -> str:
    """A count as people say it, to three figures: 8, 173k, 1.24M, 7.62B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,500 is 1M to three figures.
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g}{letter}"
    return f"{count:.0f}"


def counted(count: int, thing: str) -> str:
    """A count with its noun: 1 step, 1,200 steps."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def parameter_count(model: nn.Module) -> int:
    """The number of parameters. A tied weight counts once, a packed one as the numbers it stands for."""
    # bitsandbytes keeps two 4-bit numbers in a byte, and their shape beside them.
    return sum(math.prod((getattr(each, "quant_state", None) or each).shape) for each in model.parameters())


# Where tokenizers with one vocabulary differ: digits (also after a line break), blanks, accents and scripts, marks.
PROBES = (
    "The answer is 1234567 (or 3.14159), not 42:\n\n1. one \n2. two",
    "  two  blanks,\ttab\n\n\nlines \r\n end ",
    "naïve café, Ångström, 東京, Привет, مرحبا, 🙂👍🏽",
    "don't SHOUT; x_i += f(a[0], 'b') // comment",
)


def check_tokenizers_agree(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, size: int) -> None:
    """Raise UserError unless both tokenizers map strings to the same ids, as far as the ids below `size` go."""
    remedy = "a divergence compares id with id: choose a student and a teacher of one family"
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    # Most pairs have one vocabulary, and comparing two dictionaries is far cheaper than turning them round.
    if student_ids != teacher_ids:
        student_tokens, teacher_tokens = ({i: token for token, i in ids.items()} for ids in (student_ids, teacher_ids))
        for token_id in range(size):
            ours, theirs = student_tokens.get(token_id), teacher_tokens.get(token_id)
            if ours != theirs:
                token = ours or theirs or ""
                raise UserError(
                    f"the tokenizers of student and teacher differ: token {token!r} has id {student_ids.get(token)} for "
                    f"the student and {teacher_ids.get(token)} for the teacher; {remedy}"
                )
    for text in PROBES:
        ours, theirs = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher))
        if ours != theirs:
            at = len(list(takewhile(lambda ids: ids[0] == ids[1], zip(ours, theirs, strict=False))))
            raise UserError(
                f"the tokenizers of student and teacher share a vocabulary but split text differently: from token {at} on "
                f"{text!r} becomes {student.convert_ids_to_tokens(ours[at : at + 4])} for the student and "
                f"{teacher.convert_ids_to_tokens(theirs[at : at + 4])} for the teacher; {remedy}"
            )
