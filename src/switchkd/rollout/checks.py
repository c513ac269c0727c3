"""What every engine checks: its models once, each call before it starts, and the numbers that come out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from switchkd.errors import UserError
from switchkd.models.chat import begun, leading_ids, plain_ids
from switchkd.models.heads import base_of, cache_argument
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Sampling
from switchkd.rollout.engine import KeepTeacher, PromptLike
from switchkd.rollout.law import Policy


def check_models(pair: ModelPair) -> None:
    """Raise UserError for a model that cannot continue a text token by token through a cache that is handed to it."""
    for role, model in pair.models.items():
        inner = base_of(model)
        if getattr(inner.config, "is_encoder_decoder", False):
            reason = "is an encoder-decoder, and a rollout continues one text"
        elif not cache_argument(inner):
            # Such as Mamba and RWKV; some silently ignore one that they are given.
            reason = "reads no cache of keys and values, so it would see only the last token of a text"
        else:
            continue
        raise UserError(f"the {role}, {type(inner).__name__}, {reason}; take a decoder-only model with attention")


def checked_prompts(
    pair: ModelPair, prompts: Sequence[PromptLike], policy: Policy, sampling: Sampling, keep_teacher: KeepTeacher
) -> list[Prompt]:
    """The prompts of a `generate` call as records; those without an address are numbered by position.

    Raises UserError for settings that contradict each other, for an empty prompt, an id outside the shared vocabulary,
    text without a tokenizer, and for more positions than a model has.
    """
    if policy.needs_teacher and pair.teacher is None:
        raise UserError(f"the policy {type(policy).__name__} needs a teacher, but the pair has none; load one")
    if isinstance(keep_teacher, int) and keep_teacher < 1:
        raise UserError(
            f"keep_teacher is {keep_teacher}; give the number of the teacher's likeliest ids, or leave it out"
        )
    if keep_teacher and pair.teacher is None:
        raise UserError(f"keep_teacher is {keep_teacher!r}, but the pair has no teacher; load one, or leave it out")
    if sampling.no_repeat_ngram_size and (policy.needs_teacher or keep_teacher):
        raise UserError(
            f"no_repeat_ngram_size is {sampling.no_repeat_ngram_size}; it is for evaluating a student alone, "
            f"not where a teacher runs (policy {type(policy).__name__}); set it to 0"
        )
    records = [_record(pair, index, prompt) for index, prompt in enumerate(prompts)]
    if spent := [record.begun for record in records if record.begun >= sampling.max_new_tokens]:
        raise UserError(
            f"a response has {spent[0]} tokens already, and max_new_tokens is {sampling.max_new_tokens}; leave something to write"
        )
    longest = max((len(record.token_ids) - record.begun for record in records), default=0)
    pair.check_room(longest + sampling.max_new_tokens)
    return records


def _record(pair: ModelPair, index: int, prompt: PromptLike) -> Prompt:
    if isinstance(prompt, str):
        if pair.tokenizer is None:
            raise UserError(f"prompt {index} is text, but the pair has no tokenizer; give token ids or a tokenizer")
        (token_ids,) = plain_ids(pair.tokenizer, [prompt])
        prompt = begun(token_ids, leading_ids(pair.tokenizer))
    record = prompt if isinstance(prompt, Prompt) else Prompt(tuple(prompt), prompt_id=index)
    if not record.token_ids:
        raise UserError(f"prompt {index} is empty; a model needs at least one token to continue")
    vocabulary = pair.vocabulary_size
    if outside := [token_id for token_id in record.token_ids if not 0 <= token_id < vocabulary]:
        raise UserError(
            f"prompt {index} holds token id {outside[0]}, outside the shared vocabulary of {vocabulary} ids"
        )
    return record


def check_numbers(student_logp: Tensor, divergence: Tensor | None) -> None:
    """Raise UserError if either model's probabilities are NaN, from the written tokens' log-probabilities and divergences.

    Otherwise argmax would turn them into token 0, and training would fail silently.
    """
    for who, value in (("student", student_logp), ("teacher", divergence)):
        if value is not None and bool(value.isnan().any()):
            raise UserError(
                f"the {who}'s probabilities are NaN: its weights have diverged, or its precision is too low; go back to an "
                f"earlier checkpoint with a lower learning rate, or load it in float32"
            )
