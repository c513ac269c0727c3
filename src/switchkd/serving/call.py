"""What one `generate` call asks of a serving engine, and the columns of tensors that come back for each rollout.

Everything that crosses is JSON or plain tensors, so that it may come from a network: no pickle, and a policy of ours by name.

Shape letters: T tokens of a rollout, C tokens of all rollouts of an answer, R rollouts, K ids kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.records import FinishReason, Prompt, Rollout, Sampling, TopLogp
from switchkd.rollout.law import Policy
from switchkd.rollout.log import RolloutLog
from switchkd.rollout.policies import POLICIES, POLICY
from switchkd.serving.started import Started
from switchkd.settings.typed import typed


@dataclass(frozen=True)
class Call:
    """The settings of a call. `asks_teacher`: whether what the teacher says is recorded even where the student writes alone.

    With `top_k` the teacher's likeliest ids come back with each token, see `TopLogp`; with `margin_top_k` its margin does.
    """

    policy: Policy
    sampling: Sampling
    vocabulary_size: int
    eos_ids: tuple[int, ...]
    asks_teacher: bool = False
    top_k: int = 0
    margin_top_k: int = 0

    def to_json(self) -> str:
        """The text that `call_of` reads."""
        return json.dumps(
            {**asdict(self), "policy": POLICY.describe(self.policy), "sampling": asdict(self.sampling)}, sort_keys=True
        )


class Backend(Protocol):
    """What writes rollouts with weights that it was given; `started` is what is known of it beforehand."""

    @property
    def started(self) -> Started | None: ...  # noqa: D102

    def rollouts(
        self, prompts: Sequence[Prompt], call: Call, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> Mapping[str, Tensor]:
        """What `rollouts_of` reads."""
        ...

    def load(self, path: Path) -> int:
        """Take the student's weights from a safetensors file; returns the version that answers with them carry."""
        ...


@lru_cache(maxsize=64)
def call_of(text: str, *, any_policy: bool = False) -> Call:
    """The call that a text describes; one object for equal texts.

    A policy that is not of our table would be imported, and so run: taken only where `any_policy`, from within the process.
    Raises UserError for what is no call, naming the setting.
    """
    try:
        given = _mapping("the call", json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"the call is no JSON ({error})") from error
    policy = _mapping("policy", given.get("policy"))
    if not any_policy and policy.get("name") not in POLICIES:
        raise UserError(
            f"policy is {policy.get('name')!r}; a server takes {', '.join(POLICIES)} alone, since another one would be code"
        )
    sampling = _mapping("sampling", given.get("sampling"))
    hints = get_type_hints(Sampling)
    _check_keys("sampling", sampling, hints)
    values = {key: typed(f"sampling.{key}", value, hints[key]) for key, value in sampling.items()}
    rest = {key: given.get(key) for key in given if key not in ("policy", "sampling", "eos_ids")}
    _check_keys("the call", given, {each.name for each in fields(Call)})
    kinds = get_type_hints(Call)
    others = {key: typed(key, value, kinds[key]) for key, value in rest.items()}
    eos_ids = tuple(typed("eos_ids", given.get("eos_ids"), list[int]))
    call = Call(POLICY.make(policy), Sampling(**values), eos_ids=eos_ids, **others)
    for key, least in (("vocabulary_size", 1), ("top_k", 0), ("margin_top_k", 0)):
        if getattr(call, key) < least:
            raise UserError(f"{key} is {getattr(call, key)}; it has to be at least {least}")
    if outside := [each for each in eos_ids if not 0 <= each < call.vocabulary_size]:
        raise UserError(f"eos_ids has {outside[0]}, outside the vocabulary of {call.vocabulary_size} ids")
    if call.sampling.no_repeat_ngram_size:
        raise UserError("no_repeat_ngram_size is for evaluating a student alone; set it to 0")
    return call


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}; it has to be a mapping")
    return value


def _check_keys(key: str, given: Mapping[str, Any], known: Any) -> None:
    if unknown := [each for each in given if each not in known]:
        raise UserError(f"{key} has no {unknown[0]!r}; leave it out")


# ------ the way back

# The columns of a `RolloutLog` and the type that holds each number exactly.
_COLUMNS = {
    "token_ids": torch.int64,
    "written_by_teacher": torch.bool,
    **dict.fromkeys(
        ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part"), torch.float64
    ),
}


def answer_of(logs: Sequence[RolloutLog], versions: Sequence[int]) -> dict[str, Tensor]:
    """Finished rollouts as tensors: `lengths` and `versions` (R,), and the columns of their tokens (C,), one after another."""
    answer = {
        name: torch.tensor([value for log in logs for value in getattr(log, name)], dtype=dtype)
        for name, dtype in _COLUMNS.items()
    }
    answer["lengths"] = torch.tensor([len(log.token_ids) for log in logs], dtype=torch.int64)
    answer["versions"] = torch.tensor(versions, dtype=torch.int64)
    if any(log.margin for log in logs):
        answer["margin"] = torch.tensor([value for log in logs for value in log.margin], dtype=torch.float64)
    tops = [top for log in logs for top in log.teacher_top]
    if tops:
        answer |= {
            f"top_{name}": torch.cat([getattr(top, name) for top in tops]) for name in ("ids", "logp", "rest_logp")
        }
    return answer


def rollouts_of(answer: Mapping[str, Tensor], prompts: Sequence[Prompt], call: Call, version: int) -> list[Rollout]:
    """The rollouts of these prompts. Raises UserError for an answer that does not fit them, or by other weights."""
    lengths = _checked(answer, "lengths", torch.int64, len(prompts)).tolist()
    total = sum(lengths)
    if not all(0 < length <= call.sampling.max_new_tokens for length in lengths):
        raise UserError(
            f"the server's rollouts have {lengths} tokens; it has to be 1 to {call.sampling.max_new_tokens}"
        )
    for found in _checked(answer, "versions", torch.int64, len(prompts)).tolist():
        if found != version:
            raise UserError(f"the server wrote with weights of version {found}, not {version}; start the step again")
    columns = {name: _checked(answer, name, dtype, total).tolist() for name, dtype in _COLUMNS.items()}
    if outside := [each for each in columns["token_ids"] if not 0 <= each < call.vocabulary_size]:
        raise UserError(f"the server wrote token id {outside[0]}; the vocabulary has {call.vocabulary_size} ids")
    if "margin" in answer:
        columns["margin"] = _checked(answer, "margin", torch.float64, total).tolist()
    top = _top_of(answer, total, call)
    rollouts, start = [], 0
    for prompt, length in zip(prompts, lengths, strict=True):
        at = slice(start, start + length)
        rows: dict[str, Any] = {name: tuple(values[at]) for name, values in columns.items()}
        ended = rows["token_ids"][-1] in call.eos_ids
        reason = FinishReason.END_OF_TEXT if ended else FinishReason.LENGTH
        rollouts.append(Rollout(prompt, finish_reason=reason, teacher_top=None if top is None else top.at(at), **rows))
        start += length
    return rollouts


def _top_of(answer: Mapping[str, Tensor], total: int, call: Call) -> TopLogp | None:
    if not call.top_k:
        return None
    width = min(call.top_k, call.vocabulary_size)
    ids = _checked(answer, "top_ids", torch.int64, total, width)
    if bool(((ids < 0) | (ids >= call.vocabulary_size)).any()):
        raise UserError(f"the server's likeliest ids lie outside the vocabulary of {call.vocabulary_size}")
    logp = _checked(answer, "top_logp", torch.float32, total, width)
    return TopLogp(ids, logp, _checked(answer, "top_rest_logp", torch.float32, total))


def _checked(answer: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    found = answer.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != shape:
        said = "nothing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise UserError(
            f"the server's {name} is {said}, not {dtype} of shape {shape}; its switchkd has to be of this version"
        )
    return found
