"""What writes a block: the student drafts, the teacher scores the draft in one forward, the policy decides it all.

As it is, in pieces of rows that stay in a CPU's cache, or by graphs, whole. The tokens are the same.

Shape letters: A rows in flight, K positions of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, proposal_noise, student_proposal
from switchkd.distributions.noise import Address
from switchkd.distributions.shaping import ban_repeated_ngrams, shaped_logp
from switchkd.models.memory import numbers_at_once, numbers_in_cache, pieces
from switchkd.records import Sampling
from switchkd.rollout.block import Reading, State, Verdict, as_drafted, hidden_states, joined, written
from switchkd.rollout.cache import CachedModel
from switchkd.rollout.graphs import Graphs
from switchkd.rollout.law import Policy
from switchkd.rollout.log import Compared, RolloutLog, compare, observe
from switchkd.rollout.metrics import RolloutMetrics
from switchkd.rollout.write import teacher_margin


@dataclass
class BlockWriter:
    """Writes the blocks of one call. `models` are by role; without a teacher the student's proposals stand."""

    models: Mapping[str, CachedModel]
    policy: Policy
    sampling: Sampling
    graphs: Graphs | None
    metrics: RolloutMetrics
    margin_top_k: int
    vocabulary_size: int

    def __post_init__(self) -> None:
        self.student, self.teacher = self.models["student"], self.models.get("teacher")
        self.device = self.student.model.device
        self.weights = self.graphs.weights() if self.graphs else 0
        self.fixed = self.graphs is not None and self.graphs.shapes == "fixed"

    @cached_property
    def _at_once(self) -> int:
        """`numbers_at_once` as it is when the call first asks, with its caches in their place."""
        return numbers_at_once(self.device)

    def block(self, size: int, state: State, longest: int, logs: list[RolloutLog]) -> tuple[Verdict, Tensor | None]:
        """The verdict on the next `size` positions of every row, and the teacher's hidden states (A, K, H) there.

        `longest` is the largest of the rows' lengths, and `logs` say what the first rows have written; the other rows hold nothing.
        """
        draft = self._draft(size, state, longest, logs)
        if self.teacher is None:
            return as_drafted(draft), None
        hidden = self._states(self.teacher, draft, state, longest)
        return self._decide(self.teacher, draft, hidden, logs), hidden

    def _width(self, least: int) -> int | Tensor:
        """The number of slots that a forward looks at, where it has to see that many; see `Reading`."""
        return self.graphs.width(least, self.student.cache.shared.slots) if self.graphs else least

    def _draft(self, size: int, state: State, longest: int, logs: Sequence[RolloutLog]) -> Draft:
        """The student's proposals for the next `size` positions of every row."""
        block = torch.arange(size, device=self.device)
        address = Address(state.key[:, None].expand(-1, size), state.position[:, None] + block)
        noise: Sequence[Tensor | None] = [None] * size
        at_once = address.position.numel() * self.vocabulary_size <= numbers_in_cache(self.device)
        if not self.graphs and not self.sampling.greedy and at_once:
            # Noise depends on no token, and it is cheaper to make the whole block's at once while it stays in the cache.
            with self.metrics.timing("student"):
                noise = proposal_noise(address, self.vocabulary_size).unbind(dim=1)
        token, proposals, logps = state.pending, [], []
        for step in range(size):
            with self.metrics.timing("student"):
                # Graphs of fixed shapes look as far in all of a block, so that it takes those of one width.
                end = longest + (size if self.fixed else step + 1)
                reading = Reading(token[:, None], state.length + step, self._width(end))
                at = Address(state.key, state.position + step)
                token, logp = self._step(reading, at, noise[step], logs)
            self.metrics.forwards["student"] += 1
            proposals.append(token)
            logps.append(logp)
        return Draft(torch.stack(proposals, dim=1), torch.stack(logps, dim=1), address)

    def _step(
        self, reading: Reading, address: Address, noise: Tensor | None, logs: Sequence[RolloutLog]
    ) -> tuple[Tensor, Tensor]:
        """The student's next token of every row, and its log-probabilities; see `student_step`."""
        if self.graphs:
            return self.graphs.student_step(self.student, reading, address, self.sampling)
        logits = self.student.head(hidden_states(self.student, reading)[:, -1])
        if ngram_size := self.sampling.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, [log.text for log in logs], ngram_size)
        logp = shaped_logp(logits, self.sampling)
        greedy = self.sampling.greedy
        if greedy or noise is not None:
            return student_proposal(logp, address, greedy=greedy, noise=noise), logp
        parts = pieces(len(logp), logp.shape[-1], numbers_in_cache(self.device))
        return torch.cat([student_proposal(logp[part], address.at(part), greedy=False) for part in parts]), logp

    def _states(self, teacher: CachedModel, draft: Draft, state: State, longest: int) -> Tensor:
        """The teacher's hidden states (A, K, H) that predict the block's tokens, in one forward."""
        with self.metrics.timing("teacher"):
            device, block = teacher.model.device, torch.cat([state.pending[:, None], draft.proposal[:, :-1]], dim=1)
            reading = Reading(block.to(device), state.length.to(device), self._width(longest + block.shape[1]))
            self.metrics.forwards["teacher"] += 1
            if self.graphs:
                return self.graphs.teacher_states(teacher, reading, self.weights)
            return hidden_states(teacher, reading)

    def _decide(self, teacher: CachedModel, draft: Draft, hidden: Tensor, logs: list[RolloutLog]) -> Verdict:
        """The policy's verdict on the whole block, in groups of rows where the vocabulary is large."""
        logs = logs + [RolloutLog(logs[0].prompt)] * (len(hidden) - len(logs))
        a_row, verdicts = draft.student_logp[0].numel(), []
        # Free memory goes up and down, and a graph of fixed shapes would be made for each number of rows that it leaves room for.
        at_once = self._at_once if self.fixed else numbers_at_once(self.device)
        for group in pieces(len(hidden), a_row, at_once, of_few_sizes=self.fixed):
            drafted = draft.rows(group)
            if self.graphs:
                with self.metrics.timing("teacher"):
                    arguments = (teacher.head, hidden[group], drafted, self.sampling, self.weights)
                    compared = self.graphs.scored(*arguments)
                verdicts.append(self._verdict(drafted, compared, logs[group]))
                continue
            with self.metrics.timing("teacher"):
                logits = teacher.head(hidden[group]).to(self.device)
            for part in pieces(len(logits), a_row, numbers_in_cache(self.device)):
                with self.metrics.timing("policy"):
                    compared = compare(drafted.rows(part), shaped_logp(logits[part], self.sampling))
                verdicts.append(self._verdict(drafted.rows(part), compared, logs[group][part]))
        return joined(verdicts)

    def _verdict(self, draft: Draft, compared: Compared, logs: list[RolloutLog]) -> Verdict:
        with self.metrics.timing("policy"):
            decision = self.policy.decide(observe(self.policy, draft, compared, logs, self.sampling))
            write_tokens = self.graphs.written if self.graphs else written
            writing = write_tokens(decision, draft, compared, self.sampling)
            margin = None
            if self.margin_top_k:
                margin = teacher_margin(draft.student_logp, compared.teacher_logp, self.margin_top_k)
            return Verdict(writing, compared.divergence, decision.threshold, margin)
