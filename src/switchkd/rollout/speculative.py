"""The engine people use: the student drafts a block, the teacher scores it in one forward, the policy decides it all.

A token depends on its prefix and its address alone (noise.py), so the result is, token for token, that of the reference
engine. A block is kept up to and including the first position whose token is not the student's proposal, or the end of text.

Shape letters: A rows in flight, K positions of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from switchkd.distributions.noise import row_keys
from switchkd.distributions.shaping import top_logp_of_parts
from switchkd.errors import UserError
from switchkd.models.heads import evaluating
from switchkd.models.memory import numbers_at_once, pieces
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.block import (
    Recorded,
    State,
    kept_counts,
    read_back,
)
from switchkd.rollout.blocks import BlockChooser, Drafts, block_cost, check_block_size
from switchkd.rollout.cache import CachedModel, RaggedCache, cache_mismatch, taking_masks, why_not_ragged
from switchkd.rollout.checks import check_models, check_numbers, checked_prompts
from switchkd.rollout.engine import KeepTeacher, Progress, PromptLike
from switchkd.rollout.graphs import Compile, Graphs, bucket, check_compile, compiles
from switchkd.rollout.law import Policy
from switchkd.rollout.log import RolloutLog
from switchkd.rollout.metrics import RolloutMetrics
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.writer import BlockWriter


class SpeculativeEngine:
    """Rolls out in blocks of `block_size` tokens, or "auto": chosen on the way from what has stood of the drafts.

    At most `max_rows` rows are in flight. A finished row leaves at once and a waiting prompt takes its place, so one long row
    does not hold up the others. Memory is bounded whatever the number of prompts: each model's cache holds `max_rows` rows
    of the longest prompt + `max_new_tokens` + one block, and is kept for the next call. Neither setting changes a token.

    `compile` makes graphs of the student's step, the teacher's forward, its comparison and, on CUDA, the draw: true, false, or
    "auto", true on CUDA. The first block of a new shape then compiles, for seconds to minutes. On CUDA rows, caches and widths are
    padded to powers of two. The policy itself runs outside the graphs, and so does, with a warning, whatever torch cannot compile.

    `hidden_device` is where kept hidden states go; None leaves them on the teacher's device. With `margin_top_k` each token's
    `teacher_margin` over so many candidates is recorded where a teacher runs. Models whose caches cannot take a
    token back are served by the reference engine, with a warning; those with flash attention compute with sdpa here. `metrics`
    describes the last call. Raises UserError for a `block_size` or `max_rows` below 1.
    """

    def __init__(
        self,
        pair: ModelPair,
        block_size: int | str | None = "auto",
        max_rows: int = 64,
        hidden_device: torch.device | str | None = None,
        margin_top_k: int = 0,
        compile: Compile = "auto",
    ) -> None:
        check_block_size(block_size)
        check_compile(compile)
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
        self.graphs = Graphs(pair) if compiles(compile, pair.student.device) else None
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
        graphs = nullcontext() if self.graphs is None else self.graphs.call()
        with evaluating(student, teacher), self.pair.computing(), taking_masks(student, teacher), graphs:
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
        self.metrics = RolloutMetrics(on_cuda=self.pair.student.device.type == "cuda")
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
        self.drafts = Drafts()


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
        self.sampling = sampling
        self.keep_teacher = keep_teacher
        self.on_progress = on_progress
        self.metrics = engine.metrics
        self.device = pair.student.device
        self.hidden_device = engine.hidden_device
        keys = row_keys(seed, prompts).tolist()
        # Longest first, so that the call does not end with one long row; equal prompts together, to share their prefill.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), prompts[i].token_ids, i))
        self.waiting = [_Row(index, keys[index], prompts[index]) for index in reversed(order)]
        self.rows: list[_Row] = []
        self.results: list[Rollout | None] = [None] * len(prompts)
        self.max_rows = min(engine.max_rows, len(prompts))
        reads_teacher = pair.teacher is not None and bool(policy.needs_teacher or keep_teacher)
        # An n-gram ban looks at the tokens written so far, so it needs them one by one.
        self.graphs = None if sampling.no_repeat_ngram_size else engine.graphs
        self.chooser = BlockChooser(
            1 if sampling.no_repeat_ngram_size else engine.block_size,
            sampling.max_new_tokens,
            cost=block_cost(pair, reads_teacher=reads_teacher, graphs=self.graphs is not None),
            graphs=self.graphs.shapes if self.graphs else None,
        )
        slots = len(prompts[order[0]].token_ids) + sampling.max_new_tokens + self.chooser.largest
        # Rows that a forward computes at least, and slots in few sizes, for a graph is made for a cache.
        self.padded_rows, rows = 0, self.max_rows
        if self.graphs:
            slots, (self.padded_rows, rows) = bucket(slots), self.graphs.rows(self.max_rows)
        size, kept = (rows, slots), engine.caches
        self.models = {"student": CachedModel(pair.student, pair.student_head, *size, kept.pop("student", None))}
        if pair.teacher is not None and pair.teacher_head is not None and (policy.needs_teacher or keep_teacher):
            self.models["teacher"] = CachedModel(pair.teacher, pair.teacher_head, *size, kept.pop("teacher", None))
        self.writer = BlockWriter(
            self.models, policy, sampling, self.graphs, self.metrics, engine.margin_top_k, pair.vocabulary_size
        )
        self.eos_ids = torch.tensor(pair.eos_ids, dtype=torch.long)

    def rollouts(self) -> list[Rollout]:
        """Run until no row is left, and return the rollouts in the order of the prompts."""
        while self.rows or self.waiting:
            self._admit()
            size = self.chooser.choose([(row.drafts, self._room(row)) for row in self.rows], waiting=bool(self.waiting))
            longest = max(row.length for row in self.rows)
            verdict, hidden = self.writer.block(size, self._state(), longest, [row.log for row in self.rows])
            with self.metrics.timing("policy"):
                written = self._accept(read_back(verdict, self.eos_ids), hidden)
            self.metrics.settle()
            self.metrics.drafted += size * len(self.rows)
            self.metrics.tokens += written
            self._release()
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
        # The prompts to read come first and each once, so that a new cache is read into, and copied into only for the others.
        readers = {row.prompt_ids: row for row in reversed(arriving) if row.length}
        arriving.sort(key=lambda row: readers.get(row.prompt_ids) is not row)
        for role, model in self.models.items():
            self._prefill(role, model, arriving)
            if self.graphs and not self.rows:
                model.prepare_for_graphs()
        self.rows += arriving

    def _prefill(self, role: str, model: CachedModel, arriving: list[_Row]) -> None:
        """Give each row all of its prompt but the last token, from a row in flight with that prompt or read once for all."""
        first = len(self.rows)
        places = {row.prompt_ids: place for place, row in enumerate(self.rows)}
        unread = list(dict.fromkeys(row.prompt_ids for row in arriving if row.length and row.prompt_ids not in places))
        texts, read = [prompt[:-1] for prompt in unread], dict(zip(unread, range(len(unread)), strict=True))
        source = model
        if unread:
            with self.metrics.timing(role):
                if self.rows:
                    source = CachedModel(model.model, model.head, len(texts), max(map(len, texts)))
                self.metrics.forwards[role] += source.prefill(texts, self.pair.pad_id)
        with self.metrics.timing("cache"):
            for cache, found in ((source.cache, read), (model.cache, places)):
                rows = [(place, row) for place, row in enumerate(arriving, first) if row.prompt_ids in found]
                moves = [(found[row.prompt_ids], place) for place, row in rows]
                self._copy(model, cache, moves, [row.length for _, row in rows])

    def _copy(self, model: CachedModel, source: RaggedCache, moves: list[tuple[int, int]], lengths: list[int]) -> None:
        """Copy rows into a model's cache; one that is in its place already stays."""
        moves = [move for move in moves if source is not model.cache or move[0] != move[1]]
        if moves:
            model.cache.copy_prefixes(source, moves, max(lengths))

    def _release(self) -> None:
        """Hand in finished rows. The last rows move into the freed places, since a forward reads the first rows of a cache."""
        placed = list(enumerate(self.rows))
        for place, row in reversed(list(placed)):
            if self._room(row) and row.pending not in self.pair.eos_ids:
                continue
            self.results[row.index] = row.log.rollout(self.pair.eos_ids, self.hidden_device)
            last = placed.pop()
            if last[1] is not row:
                placed[place] = last
        moves = [(old, new) for new, (old, _) in enumerate(placed)]
        self.rows = [row for _, row in placed]
        with self.metrics.timing("cache"):
            for model in self.models.values():
                self._copy(model, model.cache, moves, [row.length for row in self.rows])
        if self.on_progress:
            self.on_progress(len(self.results) - len(self.rows) - len(self.waiting))

    # ------ a block of tokens

    def _state(self) -> State:
        """Where the rows stand, on the device in one copy. Rows that hold nothing begin at nothing."""
        rows = [(row.key, len(row.log.token_ids), row.length, row.pending) for row in self.rows]
        rows += [(0, 0, 0, 0)] * (self.padded_rows - len(rows))
        columns = torch.tensor(list(zip(*rows, strict=True)), device=self.device).unbind(dim=0)
        # Each in memory of its own, as the tokens are that come after the first: a graph tells the two apart.
        return State(*(column.clone() for column in columns))

    def _accept(self, block: Recorded, hidden: Tensor | None) -> int:
        """Write each row's block up to and including the position that ends it. Returns the number of tokens written."""
        rows = len(self.rows)
        divergence, student_logp = block.columns[2][:rows], block.columns[4][:rows]
        check_numbers(student_logp, divergence if "teacher" in self.models else None)
        kept = kept_counts(block.ends[:rows], [self._room(row) for row in self.rows])
        # They become Python's numbers, which hold those of any type exactly.
        columns = [each[:rows].tolist() for each in block.columns]
        if hidden is not None:
            self._keep(hidden, [count for count, _ in kept])
        for place, (row, (count, ended)) in enumerate(zip(self.rows, kept, strict=True)):
            self.chooser.learn(row.drafts, count - ended, ended)
            row.log.extend(*(column[place][:count] for column in columns))
            row.length += count
            row.pending = row.log.token_ids[-1]
        return sum(count for count, _ in kept)

    def _keep(self, hidden: Tensor, counts: Sequence[int]) -> None:
        """Put with each row what is kept of the teacher, from its hidden states (A, K, H) at the first tokens of the block."""
        if self.keep_teacher == "hidden":
            for place, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
                # A copy: a part of the block would keep it whole until its slowest row ends.
                row.log.teacher_hidden.append(hidden[place, :count].clone())
        elif self.keep_teacher:
            size, head = hidden.shape[1], self.models["teacher"].head
            places = [place * size + at for place, count in enumerate(counts) for at in range(count)]
            states_TH = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
            parts = pieces(len(places), head.vocabulary_size, numbers_at_once(hidden.device))
            top, start = top_logp_of_parts((head(states_TH[part]) for part in parts), self.keep_teacher), 0
            for row, count in zip(self.rows, counts, strict=True):
                row.log.teacher_top.append(top.at(slice(start, start + count)))
                start += count
