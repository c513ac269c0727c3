"""The engine people use: the student drafts a block, the teacher scores it in one forward, the policy decides it all.

A token depends on its prefix and its address alone (noise.py), so the result is, token for token, that of the reference
engine. A block is kept up to and including the first position whose token is not the student's proposal, or the end of text.

Shape letters: A rows in flight, K positions of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, proposal_noise, student_proposal
from switchkd.distributions.noise import Address, row_keys
from switchkd.distributions.shaping import ban_repeated_ngrams, shaped_logp
from switchkd.errors import UserError
from switchkd.models.heads import evaluating
from switchkd.models.memory import numbers_at_once
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.blocks import BlockChooser, check_block_size
from switchkd.rollout.cache import CachedModel, RaggedCache, cache_mismatch, taking_masks, why_not_ragged
from switchkd.rollout.checks import check_models, check_numbers, checked_prompts
from switchkd.rollout.engine import KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.rollout.log import RolloutLog, observe
from switchkd.rollout.metrics import RolloutMetrics
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.write import teacher_margin, write


class SpeculativeEngine:
    """Rolls out in blocks of `block_size` tokens, or "auto": chosen on the way from measured costs and acceptance.

    At most `max_rows` rows are in flight. A finished row leaves at once and a waiting prompt takes its place, so one long row
    does not hold up the others. Memory is bounded whatever the number of prompts: each model's cache holds `max_rows` rows
    of the longest prompt + `max_new_tokens` + one block, and is kept for the next call. Neither setting changes a token.

    `hidden_device` is where kept hidden states go; None leaves them on the teacher's device. With `margin_top_k` each token's
    `teacher_margin` over so many candidates is recorded where a teacher runs. Models whose caches cannot take a
    token back are served by the reference engine, with a warning; those with flash attention compute with sdpa here. `metrics`
    describes the last call. Raises UserError for a `block_size` or `max_rows` below 1.
    """

    def __init__(
        self,
        pair: ModelPair,
        block_size: int | str = "auto",
        max_rows: int = 64,
        hidden_device: torch.device | str | None = None,
        margin_top_k: int = 0,
    ) -> None:
        check_block_size(block_size)
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; at least one row has to be in flight")
        check_models(pair)
        self.pair = pair
        self.block_size = block_size
        self.max_rows = max_rows
        self.hidden_device = hidden_device
        self.margin_top_k = margin_top_k
        self.metrics = RolloutMetrics()
        # By role; clear it to free their memory. A call takes them out and puts them back: one that fails may leave NaN, which no
        # mask hides.
        self.caches: dict[str, RaggedCache] = {}
        self._fallback: ReferenceEngine | None = None
        students, teachers = ("student", pair.student, pair.student_head), ("teacher", pair.teacher, pair.teacher_head)
        for role, model, head in (students, teachers):
            if model is None or head is None:
                continue
            with self._computing():
                reason = why_not_ragged(model) or cache_mismatch(CachedModel(model, head, rows=2, slots=8))
            if reason is not None:
                warnings.warn(
                    f"rollouts go one token at a time: the {role} cannot draft blocks, since {reason}", stacklevel=2
                )
                self._fallback = ReferenceEngine(pair, max_rows, hidden_device, margin_top_k)
                break

    @contextmanager
    def _computing(self) -> Iterator[None]:
        student, teacher = self.pair.student, self.pair.teacher
        with evaluating(student, teacher), self.pair.computing(), taking_masks(student, teacher):
            yield

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in their order; see `Engine.generate`."""
        if self._fallback is not None:
            return self._fallback.generate(prompts, policy, sampling, seed, keep_teacher, on_progress)
        records = checked_prompts(self.pair, prompts, policy, sampling, keep_teacher)
        self.metrics = RolloutMetrics()
        if not records:
            return []
        with self._computing():
            run = _Run(self, records, policy, sampling, seed, keep_teacher, on_progress)
            rollouts = run.rollouts()
        self.caches |= {role: model.cache for role, model in run.models.items()}
        return rollouts


class _Row:
    """A rollout in flight: `length` positions are in the caches; `pending` is its newest token, not read yet."""

    def __init__(self, index: int, key: int, prompt: Prompt) -> None:
        self.index = index
        self.key = key
        self.log = RolloutLog(prompt)
        self.prompt_ids = prompt.token_ids
        self.length = len(prompt.token_ids) - 1
        self.pending = prompt.token_ids[-1]


class _Verdict(NamedTuple):
    """A decided block, all (A, K): where it must end, and what a rollout records of each token, as `RolloutLog.extend` takes it."""

    ends_block: Tensor
    token: Tensor
    by_teacher: Tensor
    divergence: Tensor
    threshold: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    law_logp: Tensor
    teacher_part: Tensor
    margin: Tensor


class _Run:
    """One `generate` call."""

    def __init__(
        self,
        engine: SpeculativeEngine,
        prompts: list[Prompt],
        policy: Policy,
        sampling: Sampling,
        seed: int,
        keep_teacher: KeepTeacher,
        on_progress: Progress | None,
    ) -> None:
        pair = engine.pair
        self.pair = pair
        self.policy = policy
        self.sampling = sampling
        self.keep_teacher = keep_teacher
        self.on_progress = on_progress
        self.metrics = engine.metrics
        self.device = pair.student.device
        self.hidden_device, self.margin_top_k = engine.hidden_device, engine.margin_top_k
        keys = row_keys(seed, prompts).tolist()
        # Longest first, so that the call does not end with one long row; equal prompts together, to share their prefill.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), prompts[i].token_ids, i))
        self.waiting = [_Row(index, keys[index], prompts[index]) for index in reversed(order)]
        self.rows: list[_Row] = []
        self.results: list[Rollout | None] = [None] * len(prompts)
        self.max_rows = min(engine.max_rows, len(prompts))
        # An n-gram ban looks at the tokens written so far, so it needs them one by one.
        self.chooser = BlockChooser(1 if sampling.no_repeat_ngram_size else engine.block_size, sampling.max_new_tokens)
        slots = len(prompts[order[0]].token_ids) + sampling.max_new_tokens + self.chooser.largest
        size, kept = (self.max_rows, slots), engine.caches
        self.student = CachedModel(pair.student, pair.student_head, *size, kept.pop("student", None))
        self.models, self.teacher = {"student": self.student}, None
        if pair.teacher is not None and pair.teacher_head is not None and (policy.needs_teacher or keep_teacher):
            self.teacher = CachedModel(pair.teacher, pair.teacher_head, *size, kept.pop("teacher", None))
            self.models["teacher"] = self.teacher
        self.eos = torch.tensor(pair.eos_ids, dtype=torch.long, device=self.device)

    def rollouts(self) -> list[Rollout]:
        """Run until no row is left, and return the rollouts in the order of the prompts."""
        while self.rows or self.waiting:
            self._admit()
            size = self.chooser.choose(max(self._room(row) for row in self.rows))
            before = dict(self.metrics.seconds)
            draft = self._draft(size)
            hidden = None
            if self.teacher is None:
                verdict = self._as_drafted(draft)
            else:
                hidden = self._teacher_hidden(self.teacher, draft)
                verdict = self._decide(self.teacher, draft, hidden)
            with self.metrics.timing("policy"):
                written, stopped = self._accept(verdict, hidden)
            self.metrics.drafted += size * len(self.rows)
            self.metrics.tokens += written
            spent = {part: self.metrics.seconds[part] - before[part] for part in before}
            self.chooser.learn(
                size, len(self.rows), written, stopped, spent["student"], spent["teacher"] + spent["policy"]
            )
            self._release()
        self.metrics.student_forwards = self.student.forwards
        self.metrics.teacher_forwards = self.teacher.forwards if self.teacher else 0
        return [rollout for rollout in self.results if rollout is not None]

    def _room(self, row: _Row) -> int:
        """The number of tokens that a row may still write."""
        return self.sampling.max_new_tokens - row.log.prompt.begun - len(row.log.token_ids)

    # ------ rows come and go

    def _admit(self) -> None:
        """Give free rows to waiting prompts."""
        free = self.max_rows - len(self.rows)
        # A few at a time: a prefill for every finished row would cost a forward each.
        if not self.waiting or (self.rows and free < max(1, self.max_rows // 8)):
            return
        arriving = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        for role, model in self.models.items():
            self._prefill(role, model, arriving)
        self.rows += arriving

    def _prefill(self, role: str, model: CachedModel, arriving: list[_Row]) -> None:
        """Give each row all of its prompt but the last token, from a row in flight with that prompt or read once for all."""
        sources = {row.prompt_ids: (model.cache, place) for place, row in enumerate(self.rows)}
        unread = list(dict.fromkeys(row.prompt_ids for row in arriving if row.length and row.prompt_ids not in sources))
        if unread:
            with self.metrics.timing(role):
                fresh = CachedModel(model.model, model.head, len(unread), max(map(len, unread)) - 1)
                fresh.prefill([prompt[:-1] for prompt in unread], self.pair.pad_id)
                model.forwards += fresh.forwards
            sources |= {prompt: (fresh.cache, place) for place, prompt in enumerate(unread)}
        with self.metrics.timing("cache"):
            for place, row in enumerate(arriving, start=len(self.rows)):
                if row.length:
                    source, source_row = sources[row.prompt_ids]
                    model.cache.copy_prefix(source, source_row, place, row.length)

    def _release(self) -> None:
        """Hand in finished rows. The last row moves into each freed place, since a forward reads the first rows of a cache."""
        with self.metrics.timing("cache"):
            for place in reversed(range(len(self.rows))):
                row = self.rows[place]
                if self._room(row) and row.pending not in self.pair.eos_ids:
                    continue
                self.results[row.index] = row.log.rollout(self.pair.eos_ids, self.hidden_device)
                last = self.rows.pop()
                if last is row:
                    continue
                self.rows[place] = last
                for model in self.models.values():
                    model.cache.copy_prefix(model.cache, len(self.rows), place, last.length)
        if self.on_progress:
            self.on_progress(len(self.results) - len(self.rows) - len(self.waiting))

    # ------ a block of tokens

    @cached_property
    def _numbers_at_once(self) -> int:
        return numbers_at_once(self.device)

    def _draft(self, size: int) -> Draft:
        """The student's proposals for the next `size` positions of every row."""
        key = torch.tensor([row.key for row in self.rows], device=self.device)
        position = torch.tensor([len(row.log.token_ids) for row in self.rows], device=self.device)
        lengths = [row.length for row in self.rows]
        token = torch.tensor([row.pending for row in self.rows], device=self.device)
        block = torch.arange(size, device=self.device)
        address = Address(key[:, None].expand(-1, size), position[:, None] + block)
        greedy, vocabulary = self.sampling.greedy, self.pair.vocabulary_size
        noise: Sequence[Tensor | None] = [None] * size
        if not greedy and address.position.numel() * vocabulary <= self._numbers_at_once:
            # Noise depends on no token, and it is cheaper to make the whole block's at once where there is room for it.
            with self.metrics.timing("student"):
                noise = proposal_noise(address, vocabulary).unbind(dim=1)
        proposals, logps = [], []
        for step in range(size):
            with self.metrics.timing("student"):
                hidden = self.student.read(token[:, None], [length + step for length in lengths])
                logits = self.student.head(hidden[:, -1])
                if ngram_size := self.sampling.no_repeat_ngram_size:
                    logits = ban_repeated_ngrams(logits, [row.log.text for row in self.rows], ngram_size)
                logps.append(shaped_logp(logits, self.sampling))
                token = student_proposal(logps[-1], address.at((slice(None), step)), greedy=greedy, noise=noise[step])
                proposals.append(token)
        return Draft(torch.stack(proposals, dim=1), torch.stack(logps, dim=1), address)

    def _as_drafted(self, draft: Draft) -> _Verdict:
        """The verdict of a student that writes alone: its proposals, as they are."""
        by_teacher = torch.zeros_like(draft.proposal, dtype=torch.bool)
        unknown = torch.full(draft.proposal.shape, torch.nan, device=self.device)
        student_logp = draft.student_logp.gather(-1, draft.proposal[..., None])[..., 0]
        ends = torch.isin(draft.proposal, self.eos)
        nothing = torch.zeros_like(student_logp)
        return _Verdict(
            ends, draft.proposal, by_teacher, unknown, unknown, student_logp, unknown, student_logp, nothing, unknown
        )

    def _teacher_hidden(self, teacher: CachedModel, draft: Draft) -> Tensor:
        """The teacher's hidden states (A, K, H) that predict the block's tokens, in one forward."""
        with self.metrics.timing("teacher"):
            pending = torch.tensor([[row.pending] for row in self.rows], device=self.device)
            block = torch.cat([pending, draft.proposal[:, :-1]], dim=1)
            return teacher.read(block, [row.length for row in self.rows])

    def _decide(self, teacher: CachedModel, draft: Draft, hidden: Tensor) -> _Verdict:
        """The policy's verdict on the whole block, in groups of rows where the vocabulary is large."""
        size = max(1, self._numbers_at_once // draft.student_logp[0].numel())
        groups = [slice(start, start + size) for start in range(0, len(self.rows), size)]
        verdicts = [self._decide_group(teacher, draft.rows(group), hidden[group], self.rows[group]) for group in groups]
        return verdicts[0] if len(verdicts) == 1 else _Verdict(*map(torch.cat, zip(*verdicts, strict=True)))

    def _decide_group(self, teacher: CachedModel, draft: Draft, hidden: Tensor, rows: list[_Row]) -> _Verdict:
        with self.metrics.timing("teacher"):
            teacher_logp = shaped_logp(teacher.head(hidden), self.sampling).to(self.device)
        with self.metrics.timing("policy"):
            positions = observe(self.policy, draft, teacher_logp, [row.log for row in rows], self.sampling)
            decision = self.policy.decide(positions)
            written = write(decision, draft, teacher_logp, positions.coin, greedy=self.sampling.greedy)
            ends, margin = written.replaced | torch.isin(written.token, self.eos), torch.zeros_like(written.token)
            if self.margin_top_k:
                margin = teacher_margin(draft.student_logp, teacher_logp, self.margin_top_k)
            decided = (written.token, written.by_teacher, positions.divergence, decision.threshold)
            return _Verdict(ends, *decided, *written[3:], margin)

    def _accept(self, verdict: _Verdict, hidden: Tensor | None) -> tuple[int, int]:
        """Write each row's block up to and including the position that ends it.

        Returns the number of tokens written, and of rows that stopped before the last token they had room for.
        """
        check_numbers(verdict.student_logp, verdict.divergence if self.teacher else None)
        ends, *recorded = verdict if self.margin_top_k and self.teacher else verdict[:-1]
        size = ends.shape[1]
        upto = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, size).tolist()
        # They become Python's numbers on the CPU, which hold those of any type exactly.
        columns = [each.tolist() for each in recorded]
        written = stopped = 0
        for place, row in enumerate(self.rows):
            count = min(upto[place], self._room(row))
            stopped += count < min(size, self._room(row))
            row.log.extend(*(column[place][:count] for column in columns))
            if self.keep_teacher and hidden is not None:
                row.log.teacher_hidden.append(hidden[place, :count])
            row.length += count
            row.pending = row.log.token_ids[-1]
            written += count
        return written, stopped
