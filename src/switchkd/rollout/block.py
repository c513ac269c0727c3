"""A block of tokens as tensors: the student's step, the teacher's forward, the verdict.

Each function here runs as it is or as a graph of the device. None asks the host for anything, but for `written_tokens` in eager
mode, so that a block waits for the device when it is read back and hardly ever before.

Shape letters: A rows in flight, K positions of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, Noise, student_proposal
from switchkd.distributions.noise import Address
from switchkd.distributions.shaping import shaped_logp
from switchkd.models.heads import Head
from switchkd.records import Sampling
from switchkd.rollout.cache import CachedModel
from switchkd.rollout.law import Decision
from switchkd.rollout.log import Compared, compare
from switchkd.rollout.write import Written, write


class Reading(NamedTuple):
    """What a model reads: new tokens (A, T), the position of each row's first (A,), and the number of slots it looks at.

    A graph that serves any number of slots takes a tensor of that many entries instead.
    """

    ids_AT: Tensor
    start_A: Tensor
    width: int | Tensor


class State(NamedTuple):
    """Where the rows stand, each (A,): the noise's key, tokens written, positions read, and the newest token, not read yet."""

    key: Tensor
    position: Tensor
    length: Tensor
    pending: Tensor


class Verdict(NamedTuple):
    """A decided block: what was written, with divergence and threshold (A, K), and the teacher's margin where it is asked for."""

    written: Written
    divergence: Tensor
    threshold: Tensor
    margin: Tensor | None = None


def hidden_states(model: CachedModel, reading: Reading) -> Tensor:
    """The hidden states (A, T, H) after each of the new tokens."""
    width = reading.width
    return model.read(reading.ids_AT, reading.start_A, width.shape[0] if isinstance(width, Tensor) else width)


def student_step(student: CachedModel, reading: Reading, address: Address, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The student's next token (A,) and the log-probabilities (A, V) it was drawn from."""
    student_logp = shaped_logp(student.head(hidden_states(student, reading)[:, -1]), sampling)
    return student_proposal(student_logp, address, greedy=sampling.greedy), student_logp


def teacher_states(teacher: CachedModel, reading: Reading, weights: int) -> Tensor:
    """The teacher's hidden states (A, K, H) that predict a block's tokens; `weights` numbers their state (graphs.py)."""
    return hidden_states(teacher, reading)


def scored(head: Head, hidden: Tensor, draft: Draft, sampling: Sampling, weights: int) -> Compared:
    """What the teacher says of a draft, from the hidden states; `weights` as above."""
    return compare(draft, shaped_logp(head(hidden), sampling).to(draft.proposal.device))


def written(
    decision: Decision, draft: Draft, compared: Compared, sampling: Sampling, noise: Noise | None = None
) -> Written:
    """The tokens of a draft, see `write`."""
    return write(decision, draft, compared, greedy=sampling.greedy, noise=noise)


def as_drafted(draft: Draft) -> Verdict:
    """The verdict of a student that writes alone: its proposals, as they are."""
    student_logp = draft.student_logp.gather(-1, draft.proposal[..., None])[..., 0]
    nobody, nothing = torch.zeros_like(draft.proposal, dtype=torch.bool), torch.zeros_like(student_logp)
    unknown = torch.full_like(student_logp, torch.nan)
    alone = Written(draft.proposal, nobody, nobody, student_logp, unknown, student_logp, nothing)
    return Verdict(alone, unknown, unknown)


def joined(verdicts: list[Verdict]) -> Verdict:
    """The verdict on all rows from those on some of them each."""
    if len(verdicts) == 1:
        return verdicts[0]
    writing = Written(*map(torch.cat, zip(*(each.written for each in verdicts), strict=True)))
    margins = [each.margin for each in verdicts if each.margin is not None]
    divergence, threshold = (torch.cat([getattr(v, name) for v in verdicts]) for name in ("divergence", "threshold"))
    return Verdict(writing, divergence, threshold, torch.cat(margins) if margins else None)


class Recorded(NamedTuple):
    """A block on the host: where a row must end (A, K), and the columns that `RolloutLog.extend` takes, in order."""

    ends: Tensor
    columns: list[Tensor]


def read_back(verdict: Verdict, eos_ids: Tensor) -> Recorded:
    """The block on the host, in one copy: the only time that it waits for the device. `eos_ids` are on the host."""
    token, replaced, by_teacher, *logps = verdict.written
    measured = [verdict.divergence, *logps, *([] if verdict.margin is None else [verdict.margin])]
    # A threshold in float64 is on the host already, and other numbers may be of that type too. Ids are exact in float32, up to 16
    # million.
    threshold, divergence = verdict.threshold, verdict.divergence
    apart = threshold.device != divergence.device or threshold.dtype == torch.float64 != divergence.dtype
    sent = [token, replaced, by_teacher, *measured, *([] if apart else [threshold])]
    table = torch.stack([each.to(divergence.dtype) for each in sent]).cpu()
    ids, parted, teachers = table[0].long(), table[1].bool(), table[2].bool()
    threshold, numbers = (threshold.cpu(), table[3:]) if apart else (table[-1], table[3:-1])
    return Recorded(
        parted | torch.isin(ids, eos_ids), [ids, teachers, numbers[0], threshold, *numbers[1:].unbind(dim=0)]
    )


def kept_counts(ends: Tensor, rooms: Sequence[int]) -> list[tuple[int, bool]]:
    """How many tokens of a block each row keeps, to its first end in `ends` (A, K), that included, and as far as it has room; and
    whether it keeps that end.
    """
    size = ends.shape[1]
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, size + 1).tolist()
    return [(min(end, size, room), end <= min(size, room)) for end, room in zip(first, rooms, strict=True)]
