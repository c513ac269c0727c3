"""The teacher rewrites the student's rollouts: the text of TRD (methods/text.py, `Rewrite`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.text import Rewrite
from switchkd.models.pair import ModelPair, position_limit
from switchkd.records import Example, Prompt, Rollout
from switchkd.rollout.engine import Engine
from switchkd.rollout.law import Teacher

# Requests have addresses of their own: no step and no calibration draws with these sample ids.
_SAMPLES = -(1 << 32)


def rewritten(
    rewrite: Rewrite,
    attempts: Sequence[Rollout],
    pairs: Mapping[str, ModelPair],
    engine: Engine,
    args: SwitchConfig,
    longest: int,
) -> list[Example]:
    """For each attempt its prompt with what its teacher writes in its place: at most `longest` tokens, in one engine call."""
    limit = _request_limit(pairs.values(), args)
    requests = [
        Prompt(
            _request(rewrite, attempt, pairs[attempt.prompt.teacher], args, limit),
            attempt.prompt.prompt_id,
            sample_id=_SAMPLES - attempt.prompt.sample_id,
            teacher=attempt.prompt.teacher,
        )
        for attempt in attempts
    ]
    sampling = replace(args.sampling, max_new_tokens=longest)
    texts = engine.generate(requests, policy=Teacher(), sampling=sampling, seed=args.seed)
    return [Example(attempt.prompt, text.token_ids) for attempt, text in zip(attempts, texts, strict=True)]


def check_rewrite(rewrite: Rewrite, longest_prompt: Prompt, pair: ModelPair, args: SwitchConfig) -> None:
    """Raise UserError where the pair has no tokenizer, or a request does not leave half of its room to the attempt."""
    if pair.tokenizer is None:
        raise UserError("rewrite asks the teacher in words, but the pair has no tokenizer; give one")
    limit, bare = _request_limit([pair], args), len(_ids(rewrite, longest_prompt, (), pair, args))
    if limit is not None and bare + args.max_new_tokens / 2 > limit:
        raise UserError(
            f"rewrite asks the teacher with {bare} tokens besides the attempt, but a model has room for {limit} before "
            f"{args.max_new_tokens} new ones; lower max_new_tokens or max_prompt_tokens, or shorten the template"
        )


def _request_limit(pairs: Iterable[ModelPair], args: SwitchConfig) -> int | None:
    models = {model for pair in pairs for model in pair.models.values()}
    limits = [limit for model in models if (limit := position_limit(model)) is not None]
    return min(limits) - args.max_new_tokens if limits else None


def _request(
    rewrite: Rewrite, attempt: Rollout, pair: ModelPair, args: SwitchConfig, limit: int | None
) -> tuple[int, ...]:
    """The request's ids; an attempt that does not fit loses its end."""
    shown = attempt.token_ids
    ids = _ids(rewrite, attempt.prompt, shown, pair, args)
    while limit is not None and len(ids) > limit and shown:
        shown = shown[: -max(1, len(ids) - limit)]
        ids = _ids(rewrite, attempt.prompt, shown, pair, args)
    return ids


def _ids(
    rewrite: Rewrite, prompt: Prompt, attempt: Sequence[int], pair: ModelPair, args: SwitchConfig
) -> tuple[int, ...]:
    tokenizer, theirs = pair.tokenizer, pair.teacher_tokenizer or pair.tokenizer
    assert tokenizer is not None
    assert theirs is not None
    prompt_text, attempt_text = (
        str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in (prompt.token_ids, attempt)
    )
    request = rewrite.request(prompt_text, attempt_text)
    # The teacher is asked as it is used to be; without a template of its own, as the student is.
    speaker = theirs if getattr(theirs, "chat_template", None) else tokenizer
    if not getattr(speaker, "chat_template", None):
        leading = args.rendering.leading_ids(tokenizer)
        return (*leading, *tokenizer(request, add_special_tokens=False)["input_ids"])
    message = [{"role": "user", "content": request}]
    more = args.chat_template_kwargs or {}
    text = str(speaker.apply_chat_template(message, add_generation_prompt=True, tokenize=False, **more))
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
