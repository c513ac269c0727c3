"""The engine people use: the student drafts a block, the teacher scores it in one forward, the policy decides it all.

A token depends on its prefix and its address alone (noise.py), so the result is, token for token, that of the reference
engine. A block is kept up to and with the first position whose token is not the student's proposal, or the end of text.

Shape letters: A rows in flight, K positions of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd.distributions.draw import independent_token, keeps_proposal, proposal_noise, replacement, student_proposal
from switchkd.distributions.noise import Address, row_keys, shaped_logp
from switchkd.errors import UserError
from switchkd.models.heads import evaluating
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.blocks import BlockChooser
from switchkd.rollout.cache import CachedModel, why_not_ragged
from switchkd.rollout.engine import (
    KeepTeacher,
    Progress,
    PromptLike,
    RolloutLog,
    as_prompts,
    ban_repeated_ngrams,
    check_call,
    check_models,
    check_numbers,
    seen_by,
)
from switchkd.rollout.metrics import RolloutMetrics
from switchkd.rollout.policies import Policy
from switchkd.rollout.reference import ReferenceEngine

# Both models' distributions over a block, and a handful of tensors of that size while they are compared, exist at one
# time for as many rows as make about this many numbers (64 MB a tensor in float32).
_COMPARED_NUMBERS = 1 << 24


class SpeculativeEngine:
    """Rolls out in blocks of `block_size` tokens (or "auto": chosen while running from measured costs and acceptance).

    At most `max_rows` rows are in flight; a finished row leaves at once and a waiting prompt takes its place, so one long row
    does not hold the others, and memory is bounded whatever the number of prompts: the caches of both models for `max_rows` rows
    of the longest prompt + `max_new_tokens` + one block. Neither setting changes a token.

    Models whose caches cannot take a token back are served by the reference engine, with a warning. `metrics` describes
    the last call. Raises UserError for a `block_size` below 1.
    """

    def __init__(self, pair: ModelPair, block_size: int | str = "auto", max_rows: int = 64) -> None:
        if block_size != "auto" and (not isinstance(block_size, int) or block_size < 1):
            raise UserError(f"block_size is {block_size!r}; give 1 or more tokens, or 'auto'")
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; at least one row has to be in flight")
        self.pair = pair
        self.block_size = block_size
        self.max_rows = max_rows
        self.metrics = RolloutMetrics()
        self._fallback: ReferenceEngine | None = None
        check_models(pair)
        heads = (pair.student_head, pair.teacher_head)
        for (role, model), head in zip(pair.models.items(), heads, strict=False):
            assert head is not None
            reason = why_not_ragged(model) or _trial(CachedModel(model, head, rows=2, slots=8))
            if reason is not None:
                warnings.warn(
                    f"rollouts go one token at a time: the {role} cannot draft blocks, since {reason}", stacklevel=2
                )
                self._fallback = ReferenceEngine(pair, max_rows)
                break

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in their order; see `Engine.generate`. Raises UserError for bad prompts."""
        if self._fallback is not None:
            return self._fallback.generate(prompts, policy, sampling, seed, keep_teacher, on_progress)
        check_call(policy, sampling, self.pair.teacher, keep_teacher)
        records = as_prompts(prompts, self.pair.tokenizer, self.pair.vocabulary_size)
        self.metrics = RolloutMetrics()
        if not records:
            return []
        with evaluating(self.pair.student, self.pair.teacher):
            return _Run(self, records, policy, sampling, seed, keep_teacher, on_progress).finish()


@dataclass
class _Row:
    """A rollout in flight: `length` positions are in the caches, `pending` is its newest token, not yet read."""

    index: int
    key: int
    log: RolloutLog
    length: int
    pending: int

    @property
    def prompt(self) -> Prompt:
        return self.log.prompt


@dataclass(frozen=True)
class _Draft:
    """What the student proposes for a block: ids (A, K), its log-probabilities (A, K, V), and where they were drawn."""

    proposal: Tensor
    student_logp: Tensor
    address: Address


@dataclass(frozen=True)
class _Verdict:
    """A decided block, all (A, K): the tokens, where a block must end, and what a rollout records of each token."""

    token: Tensor
    ends_block: Tensor
    by_teacher: Tensor
    measures: tuple[Tensor, ...]


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
        keys = row_keys(seed, prompts).tolist()
        # Longest first, so that the end of the call is not one long row; equal prompts together, to share their prefill.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), prompts[i].token_ids, i))
        self.waiting = [_new_row(index, keys[index], prompts[index]) for index in order]
        self.waiting.reverse()
        self.rows: list[_Row] = []
        self.results: list[Rollout | None] = [None] * len(prompts)
        self.max_rows = min(engine.max_rows, len(prompts))
        # An n-gram ban looks at the tokens written so far, so those have to be known one by one.
        self.chooser = BlockChooser(1 if sampling.no_repeat_ngram_size else engine.block_size, sampling.max_new_tokens)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        pair.check_room(longest + sampling.max_new_tokens)
        slots = longest + sampling.max_new_tokens + self.chooser.largest
        self.student = CachedModel(pair.student, pair.student_head, self.max_rows, slots)
        self.teacher = None
        if pair.teacher is not None and pair.teacher_head is not None and (policy.needs_teacher or keep_teacher):
            self.teacher = CachedModel(pair.teacher, pair.teacher_head, self.max_rows, slots)
        self.eos = torch.tensor(pair.eos_ids, dtype=torch.long, device=self.device)

    def finish(self) -> list[Rollout]:
        """Run until no row is left."""
        while self.rows or self.waiting:
            self._admit()
            size = self.chooser.choose(max(self._room(row) for row in self.rows))
            before = dict(self.metrics.seconds)
            draft = self._draft(size)
            hidden = None
            if self.teacher is None:
                verdict = self._alone(draft)
            else:
                hidden = self._teacher_hidden(draft)
                verdict = self._decide(draft, hidden)
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
        """How many tokens a row may still write."""
        return self.sampling.max_new_tokens - len(row.log.token_ids)

    # ----------------------------------------------------------------------------------------------- rows come and go

    def _admit(self) -> None:
        """Give free rows to waiting prompts, a few at a time: a prefill for each finished row would cost a forward each."""
        free = self.max_rows - len(self.rows)
        if not self.waiting or (self.rows and free < max(1, self.max_rows // 8)):
            return
        arriving = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        for model in (self.student, self.teacher):
            if model is not None:
                self._prefill(model, arriving)
        self.rows += arriving

    def _prefill(self, model: CachedModel, arriving: list[_Row]) -> None:
        """Give each row its prompt but the last token: from a row in flight that has it, else read once for all."""
        sources = {row.prompt.token_ids: (model.cache, place) for place, row in enumerate(self.rows)}
        unread = list(
            dict.fromkeys(
                row.prompt.token_ids for row in arriving if row.length and row.prompt.token_ids not in sources
            )
        )
        if unread:
            with self.metrics.timing("student" if model is self.student else "teacher"):
                width = max(map(len, unread)) - 1
                fresh = CachedModel(model.model, model.head, len(unread), width)
                padded = [[*prompt[:-1], *[self.pair.pad_id] * (width - len(prompt) + 1)] for prompt in unread]
                fresh.read(torch.tensor(padded), [0] * len(unread))
                model.forwards += 1
            sources |= {prompt: (fresh.cache, place) for place, prompt in enumerate(unread)}
        with self.metrics.timing("cache"):
            for place, row in enumerate(arriving, start=len(self.rows)):
                if row.length:
                    source, source_row = sources[row.prompt.token_ids]
                    model.cache.copy_prefix(source, source_row, place, row.length)

    def _release(self) -> None:
        """Hand in finished rows; the last row moves into each place that gets free, so that rows in use stay the first ones."""
        with self.metrics.timing("cache"):
            for place in reversed(range(len(self.rows))):
                row = self.rows[place]
                if self._room(row) and row.pending not in self.pair.eos_ids:
                    continue
                self.results[row.index] = row.log.finished(self.pair.eos_ids)
                last = self.rows.pop()
                if last is row:
                    continue
                self.rows[place] = last
                for model in (self.student, self.teacher):
                    if model is not None:
                        model.cache.copy_prefix(model.cache, len(self.rows), place, last.length)
        if self.on_progress:
            self.on_progress(len(self.results) - len(self.rows) - len(self.waiting))

    # ------------------------------------------------------------------------------------------------- a block of tokens

    def _draft(self, size: int) -> _Draft:
        """The student's proposals for the next `size` positions of every row."""
        key = torch.tensor([row.key for row in self.rows], device=self.device)
        position = torch.tensor([len(row.log.token_ids) for row in self.rows], device=self.device)
        lengths = [row.length for row in self.rows]
        token = torch.tensor([row.pending for row in self.rows], device=self.device)
        block = torch.arange(size, device=self.device)
        address = Address(key[:, None].expand(-1, size), position[:, None] + block)
        greedy, vocabulary = self.sampling.greedy, self.pair.vocabulary_size
        noise: Sequence[Tensor | None] = [None] * size
        if not greedy and address.position.numel() * vocabulary <= _COMPARED_NUMBERS:
            # It depends on no token, so a small model's is cheaper made for all of the block at once.
            with self.metrics.timing("student"):
                noise = proposal_noise(address, vocabulary).unbind(dim=1)
        proposals, logps = [], []
        for step in range(size):
            with self.metrics.timing("student"):
                hidden = self.student.read(token[:, None], [length + step for length in lengths])
                logits = self.student.head(hidden[:, -1])
                if self.sampling.no_repeat_ngram_size:
                    so_far = [[*row.prompt.token_ids, *row.log.token_ids] for row in self.rows]
                    logits = ban_repeated_ngrams(logits, so_far, self.sampling.no_repeat_ngram_size)
                logps.append(shaped_logp(logits, self.sampling))
                token = student_proposal(logps[-1], address.at((slice(None), step)), greedy=greedy, noise=noise[step])
                proposals.append(token)
        return _Draft(torch.stack(proposals, dim=1), torch.stack(logps, dim=1), address)

    def _alone(self, draft: _Draft) -> _Verdict:
        """The student's proposals, taken as they are."""
        by_teacher = torch.zeros_like(draft.proposal, dtype=torch.bool)
        unknown = torch.full(draft.proposal.shape, torch.nan, device=self.device)
        student_logp = draft.student_logp.gather(-1, draft.proposal[..., None])[..., 0]
        ends = torch.isin(draft.proposal, self.eos)
        return _Verdict(draft.proposal, ends, by_teacher, (unknown, unknown, student_logp, unknown))

    def _teacher_hidden(self, draft: _Draft) -> Tensor:
        """The teacher's hidden states (A, K, H) that predict the block's tokens, in one forward."""
        assert self.teacher is not None
        with self.metrics.timing("teacher"):
            pending = torch.tensor([[row.pending] for row in self.rows], device=self.device)
            block = torch.cat([pending, draft.proposal[:, :-1]], dim=1)
            return self.teacher.read(block, [row.length for row in self.rows])

    def _decide(self, draft: _Draft, hidden: Tensor) -> _Verdict:
        """The policy's decision for the whole block, a group of rows at a time where the vocabulary is large."""
        rows = max(1, _COMPARED_NUMBERS // draft.student_logp[0].numel())
        parts = [self._decide_rows(draft, hidden, slice(at, at + rows)) for at in range(0, len(self.rows), rows)]
        if len(parts) == 1:
            return parts[0]
        measures = tuple(torch.cat(each) for each in zip(*(part.measures for part in parts), strict=True))
        token, ends, by_teacher = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("token", "ends_block", "by_teacher")
        )
        return _Verdict(token, ends, by_teacher, measures)

    def _decide_rows(self, draft: _Draft, hidden: Tensor, rows: slice) -> _Verdict:
        assert self.teacher is not None
        proposal, student_logp, greedy = draft.proposal[rows], draft.student_logp[rows], self.sampling.greedy
        address = Address(draft.address.key[rows], draft.address.position[rows])
        with self.metrics.timing("teacher"):
            teacher_logp = shaped_logp(self.teacher.head(hidden[rows]), self.sampling).to(self.device)
        with self.metrics.timing("policy"):
            logs = [row.log for row in self.rows[rows]]
            seen = seen_by(
                self.policy, proposal, student_logp, teacher_logp, address, logs, self.sampling.max_new_tokens
            )
            decision = self.policy.decide(seen)
            token = proposal.clone()
            if self.policy.draws_anew:
                anew = decision.by_teacher
                token[anew] = independent_token(teacher_logp[anew], address.at(anew), greedy=greedy)
                # The teacher may draw what it refused, and then the block goes on.
                replaced = token != proposal
            else:
                kept = keeps_proposal(proposal, student_logp, teacher_logp, address, greedy=greedy)
                replaced = decision.by_teacher & ~kept
                # What follows a replaced proposal was drafted on another prefix: only the first one of a row is drawn.
                replaced &= replaced.cumsum(dim=1) == 1
                if bool(replaced.any()):
                    token[replaced] = replacement(
                        student_logp[replaced], teacher_logp[replaced], address.at(replaced), greedy=greedy
                    )
            logps = (each.gather(-1, token[..., None])[..., 0] for each in (student_logp, teacher_logp))
            ends = replaced | torch.isin(token, self.eos)
            return _Verdict(token, ends, decision.by_teacher, (seen.divergence, decision.threshold, *logps))

    def _accept(self, verdict: _Verdict, hidden: Tensor | None) -> tuple[int, int]:
        """Write each row's block up to and with the position that ends it.

        Returns the number of tokens written, and of rows that stopped before the last token they had room for.
        """
        divergence, _, student_logp, _ = verdict.measures
        check_numbers(student_logp, divergence if self.teacher else None)
        size = verdict.token.shape[1]
        upto = torch.where(verdict.ends_block.any(dim=1), verdict.ends_block.int().argmax(dim=1) + 1, size).tolist()
        tokens, by_teacher = verdict.token.tolist(), verdict.by_teacher.tolist()
        measures = torch.stack([measure.double() for measure in verdict.measures]).tolist()
        written = stopped = 0
        for place, row in enumerate(self.rows):
            count = min(upto[place], self._room(row))
            stopped += count < min(size, self._room(row))
            log = row.log
            log.token_ids += tokens[place][:count]
            log.written_by_teacher += by_teacher[place][:count]
            kept = (log.divergence, log.threshold, log.student_logp, log.teacher_logp)
            for values, measure in zip(kept, measures, strict=True):
                values += measure[place][:count]
            if self.keep_teacher and hidden is not None:
                log.teacher_hidden.append(hidden[place, :count].cpu())
            row.length += count
            row.pending = log.token_ids[-1]
            written += count
        return written, stopped


def _new_row(index: int, key: int, prompt: Prompt) -> _Row:
    return _Row(index, key, RolloutLog(prompt), length=len(prompt.token_ids) - 1, pending=prompt.token_ids[-1])


def _trial(cached: CachedModel) -> str | None:
    """Why two ragged rows read through the cache do not give what the model gives without one, or None where they do."""
    model, vocabulary = cached.model, cached.head.vocabulary_size
    ids = torch.arange(5, device=model.device)[None].repeat(2, 1) * 7 % vocabulary
    with evaluating(model):
        plain = cached.backbone(input_ids=ids, use_cache=False).last_hidden_state
        try:
            # A wrong token at position 2 of row 0 is overwritten, while row 1 is one position ahead.
            cached.read(ids[:, :2], [0, 0])
            cached.read(torch.stack([(ids[0, 2:3] + 1) % vocabulary, ids[1, 2:3]]), [2, 2])
            first = cached.read(torch.stack([ids[0, 2:4], ids[1, 3:5]]), [2, 3])
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            return f"its forward does not take our cache and mask ({type(error).__name__}: {error})"
    expected = torch.stack([plain[0, 2:4], plain[1, 3:5]])
    # Kernels choose by shape, so the roundings of a few layers differ; a wrong mask or position is far outside.
    tolerance = 1e3 * torch.finfo(model.dtype).eps * expected.abs().max()
    if not bool(((first - expected).abs() <= tolerance).all()):
        return "its states through our cache differ from those without a cache"
    return None
