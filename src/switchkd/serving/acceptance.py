"""SWITCH as an acceptance rule of speculative decoding: the server's student drafts, its teacher's logits come in, tokens go out.

Knows no server. The draws are the addressed ones of every engine, so the tokens are those of the reference engine, to the
rounding of the server's kernels. Each response token has a draft, the first one too: the server is given a prompt without its
last token, and that token is what it is made to write first. No bonus token is written after a draft that stands in full: what
the student would have said there is not known.

Shape letters: B requests of a server's step, A those that go together, K drafted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, student_proposal
from switchkd.distributions.noise import Address
from switchkd.distributions.shaping import shaped_logp, top_logp
from switchkd.records import Prompt
from switchkd.rollout.block import Recorded, Verdict, as_drafted, kept_counts, read_back
from switchkd.rollout.log import RolloutLog, compare, observe
from switchkd.rollout.write import teacher_margin, write
from switchkd.serving.call import Call

KindT = TypeVar("KindT")
# What stands where a request has no more tokens in a step, as servers have it.
NO_TOKEN = -1


@dataclass
class Drafted:
    """A request's draft: its tokens, and the log-probabilities (V,) that each was drawn from."""

    tokens: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)


class Request:
    """A rollout that a server is at. `prompt` may hold the last token of the prompt alone; `version` numbers the student's weights.

    `lost` is why its draft was not there when it was needed, and `fault` what was wrong with the numbers; then nothing is recorded.
    """

    def __init__(self, call: Call, prompt: Prompt, key: int, version: int) -> None:
        self.call = call
        self.key = key
        self.version = version
        self.log = RolloutLog(prompt)
        self.drafted = Drafted()
        self.has_prompt = False
        self.lost = ""
        self.fault = ""

    @property
    def room(self) -> int:
        """The number of tokens that it may still write."""
        return self.call.sampling.max_new_tokens - self.log.prompt.begun - len(self.log.token_ids)

    @property
    def finished(self) -> bool:
        """Whether nothing more is written."""
        ended = bool(self.log.token_ids) and self.log.token_ids[-1] in self.call.eos_ids
        return ended or self.room <= 0 or bool(self.lost or self.fault)

    @property
    def filler(self) -> int:
        """What a server is told that a finished request wrote: an end of text, where that is not how its prompt ended."""
        last = self.log.prompt.token_ids[-1]
        return next((each for each in self.call.eos_ids if each != last), last)


def propose(requests: Sequence[Request], logits_BV: Tensor) -> Tensor:
    """The student's next proposal for each request, ids (B,), from its logits; kept for `accept`."""
    token_B = torch.zeros(len(requests), dtype=torch.int64, device=logits_BV.device)
    for call, rows in _together(request.call for request in requests):
        logp = shaped_logp(logits_BV[rows][:, : call.vocabulary_size], call.sampling)
        key = torch.tensor([requests[row].key for row in rows], device=logp.device)
        reached = [len(requests[row].log.token_ids) + len(requests[row].drafted.tokens) for row in rows]
        address = Address(key, torch.tensor(reached, device=logp.device))
        tokens = student_proposal(logp, address, greedy=call.sampling.greedy)
        token_B[rows] = tokens
        for place, row in enumerate(rows):
            requests[row].drafted.tokens.append(tokens[place])
            requests[row].drafted.logp.append(logp[place])
    return token_B


def accept(
    requests: Sequence[Request], drafts: Sequence[Sequence[int]], logits: Sequence[Tensor], unread: Sequence[int] = ()
) -> list[list[int]]:
    """What each request writes in a step of the server.

    `drafts` are the ids that the server has checked for each request, and `logits`, each (K, V), its teacher's at these
    positions. The `unread` requests have not read their prompt to the end, and write nothing that counts.
    """
    written: list[list[int]] = [[] for _ in requests]
    ready: list[int] = []
    for row, request in enumerate(requests):
        drafted, request.drafted = request.drafted, Drafted()
        if row in unread or request.finished:
            written[row] = [request.filler]
        elif not request.has_prompt:
            request.has_prompt = True
            written[row] = [request.log.prompt.token_ids[-1]]
        elif not drafts[row] or [*drafts[row]] != [int(token) for token in drafted.tokens[: len(drafts[row])]]:
            request.lost = "the server took its cache for another one, or had no room for a draft"
            written[row] = [request.filler]
        else:
            request.drafted = drafted
            ready.append(row)
    alike = [(requests[row].call, len(drafts[row])) for row in ready]
    for (call, size), places in _together(alike):
        rows = [ready[place] for place in places]
        group = [requests[row] for row in rows]
        teacher_logits = torch.stack([logits[row] for row in rows])[..., : call.vocabulary_size]
        for row, tokens in zip(rows, _written(call, size, group, teacher_logits), strict=True):
            written[row] = tokens
    return written


def _together(kinds: Iterable[KindT]) -> list[tuple[KindT, list[int]]]:
    """Each kind with the places that it has, in order."""
    found: dict[KindT, list[int]] = {}
    for place, kind in enumerate(kinds):
        found.setdefault(kind, []).append(place)
    return [*found.items()]


def _written(call: Call, size: int, group: Sequence[Request], teacher_logits: Tensor) -> list[list[int]]:
    """Decide the first `size` drafted positions of requests of one call, and record what was written."""
    device = teacher_logits.device
    drafts = [request.drafted for request in group]
    key = torch.tensor([[request.key] for request in group], device=device).expand(-1, size)
    begun = torch.tensor([[len(request.log.token_ids)] for request in group], device=device)
    draft = Draft(
        torch.stack([torch.stack(each.tokens[:size]) for each in drafts]),
        torch.stack([torch.stack(each.logp[:size]) for each in drafts]),
        Address(key, begun + torch.arange(size, device=device)),
    )
    asks_teacher = call.policy.needs_teacher or call.asks_teacher
    verdict = _verdict(call, group, draft, teacher_logits) if asks_teacher else as_drafted(draft)
    block = read_back(verdict, torch.tensor(call.eos_ids, dtype=torch.long))
    for request in group:
        request.drafted = Drafted()
    return _recorded(call, group, block, teacher_logits, asks_teacher=asks_teacher)


def _verdict(call: Call, group: Sequence[Request], draft: Draft, teacher_logits: Tensor) -> Verdict:
    compared = compare(draft, shaped_logp(teacher_logits, call.sampling))
    logs = [request.log for request in group]
    decision = call.policy.decide(observe(call.policy, draft, compared, logs, call.sampling))
    writing = write(decision, draft, compared, greedy=call.sampling.greedy)
    margin = None
    if call.margin_top_k:
        margin = teacher_margin(draft.student_logp, compared.teacher_logp, call.margin_top_k)
    return Verdict(writing, compared.divergence, decision.threshold, margin)


def _recorded(
    call: Call, group: Sequence[Request], block: Recorded, teacher_logits: Tensor, *, asks_teacher: bool
) -> list[list[int]]:
    counts = [count for count, _ in kept_counts(block.ends, [request.room for request in group])]
    columns = [column.tolist() for column in block.columns]
    # Of a student alone the divergence is not known, and NaN for that.
    wrong = block.columns[4].isnan() | (block.columns[2].isnan() & asks_teacher)
    written = []
    for place, (request, count) in enumerate(zip(group, counts, strict=True)):
        if bool(wrong[place, :count].any()):
            request.fault = "the probabilities of student or teacher are NaN"
            written.append([request.filler])
            continue
        request.log.extend(*(column[place][:count] for column in columns))
        if call.top_k:
            request.log.teacher_top.append(top_logp(teacher_logits[place, :count], call.top_k))
        written.append(request.log.token_ids[-count:])
    return written
