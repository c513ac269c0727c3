"""A decided position becomes a token, with what a rollout records of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, Noise, written_tokens
from switchkd.rollout.law import Decision
from switchkd.rollout.log import Compared


class Written(NamedTuple):
    """What was written at each position, all (B,) or (B, K), and undefined past the first `replaced` position of a row.

    `token` and, where it is not the student's proposal, `replaced`; `by_teacher`: its writer; `student_logp`, `teacher_logp`
    and `law_logp`: its log-probability in nats under the two models and under the law that wrote it; `teacher_part`: the
    probability, given the token, that the teacher is its writer.
    """

    token: Tensor
    replaced: Tensor
    by_teacher: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    law_logp: Tensor
    teacher_part: Tensor


def write(decision: Decision, draft: Draft, compared: Compared, *, greedy: bool, noise: Noise | None = None) -> Written:
    """The tokens of a draft under the decided laws. `noise` is that of `written_tokens`."""
    blend, elsewhere, teacher_logp = decision.blend, decision.by_teacher, compared.teacher_logp
    law_logp = teacher_logp if blend is None else blend.logp
    token, replaced = written_tokens(draft, law_logp, elsewhere, greedy=greedy, keep=compared.keep, noise=noise)
    at_token = token.unsqueeze(-1)
    student_at, teacher_at = (logp.gather(-1, at_token)[..., 0] for logp in (draft.student_logp, teacher_logp))
    if blend is None:
        law_at, part = torch.where(elsewhere, teacher_at, student_at), elsewhere.to(student_at.dtype)
        return Written(token, replaced, elsewhere, student_at, teacher_at, law_at, part)
    law_at = torch.where(elsewhere, blend.logp.gather(-1, at_token)[..., 0], student_at)
    if blend.teacher_mass is None:
        part, by_teacher = (1 - (student_at - law_at).exp()).clamp(min=0), replaced
    else:
        # Rounding may leave the part of a token that only the teacher writes above 1.
        part = (blend.teacher_mass * (teacher_at - law_at).exp()).clamp(max=1)
        part = part.masked_fill(~elsewhere, 0.0)
        by_teacher = compared.coin < part
    return Written(token, replaced, by_teacher, student_at, teacher_at, law_at, part)


def teacher_margin(student_logp: Tensor, teacher_logp: Tensor, top_k: int) -> Tensor:
    """What, in nats, the teacher's favorite among the student's `top_k` likeliest ids has over the next of them; (...) of (..., V).

    Infinite where the teacher excludes all of them but one.
    """
    candidates = student_logp.topk(min(top_k, student_logp.shape[-1]), dim=-1).indices
    first, second = teacher_logp.gather(-1, candidates).topk(2, dim=-1).values.unbind(dim=-1)
    # Where the teacher excludes even the favorite, nothing sets one apart.
    return (first - second).masked_fill(first.isneginf(), 0.0)
