"""The oracle: one token at a time, both models, no tricks. Every other engine is tested against this one.

Shape letters: B rows, T new positions, S positions so far, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from switchkd.distributions.draw import Draft, student_proposal
from switchkd.distributions.noise import Address, row_keys
from switchkd.distributions.shaping import ban_repeated_ngrams, shaped_logp, top_logp
from switchkd.models.heads import cache_argument, evaluating
from switchkd.models.pair import ModelPair, position_limit
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.checks import check_models, check_numbers, checked_prompts
from switchkd.rollout.engine import KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.rollout.log import RolloutLog, compare, observe
from switchkd.rollout.write import teacher_margin, write


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows that end together, both (B, T) int64; padding is marked by length, never by its id."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Decoder:
    """One model with its key/value cache over a left-padded batch, fed one step at a time."""

    def __init__(self, model: PreTrainedModel, vocabulary_size: int, keep_hidden: bool = False) -> None:
        self.model = model
        self.vocabulary_size = vocabulary_size
        self.keep_hidden = keep_hidden
        self.cache = DynamicCache(config=model.config)
        self.cache_argument = cache_argument(model)
        self.hidden_BH = torch.empty(0)

    def step(self, ids_BT: Tensor, mask_BS: Tensor) -> Tensor:
        """Next-token logits (B, V) after `ids_BT`; the mask covers everything fed so far."""
        device = self.model.device
        mask_BS = mask_BS.to(device)
        # A row counts its positions from its first token, wherever padding puts it.
        position_ids = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        if (limit := position_limit(self.model)) is not None:
            # A row that began with part of its response has ended, and goes on in the batch unread.
            position_ids = position_ids.clamp(max=limit - 1)
        output = self.model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BS,
            position_ids=position_ids,
            **{self.cache_argument: self.cache},
            use_cache=True,
            output_hidden_states=self.keep_hidden,
            logits_to_keep=1,
        )
        if self.keep_hidden:
            self.hidden_BH = output.hidden_states[-1][:, -1]
        logits: Tensor = output.logits[:, -1, : self.vocabulary_size]
        return logits


class ReferenceEngine:
    """Rolls out token by token, with one forward of each model per token; batched, left-padded, cached.

    `max_rows` prompts run together (default 64); the result does not depend on it. `hidden_device` is where kept hidden states
    go; None leaves them on the teacher's device. With `margin_top_k` each token's `teacher_margin` over so many candidates is
    recorded where a teacher runs.
    """

    def __init__(
        self,
        pair: ModelPair,
        max_rows: int = 64,
        hidden_device: torch.device | str | None = None,
        margin_top_k: int = 0,
    ) -> None:
        check_models(pair)
        self.pair = pair
        self.max_rows = max_rows
        self.hidden_device = hidden_device
        self.margin_top_k = margin_top_k

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
        records = checked_prompts(self.pair, prompts, policy, sampling, keep_teacher)
        rollouts: list[Rollout] = []
        with evaluating(self.pair.student, self.pair.teacher), self.pair.computing():
            for start in range(0, len(records), self.max_rows):
                batch = records[start : start + self.max_rows]
                rollouts += self._roll_out(batch, policy, sampling, seed, keep_teacher)
                if on_progress:
                    on_progress(len(rollouts))
        return rollouts

    def _roll_out(
        self, prompts: list[Prompt], policy: Policy, sampling: Sampling, seed: int, keep_teacher: KeepTeacher
    ) -> list[Rollout]:
        pair, device = self.pair, self.pair.student.device
        student = _Decoder(pair.student, pair.vocabulary_size)
        teacher = None
        if pair.teacher is not None and (policy.needs_teacher or keep_teacher):
            teacher = _Decoder(pair.teacher, pair.vocabulary_size, keep_hidden=keep_teacher == "hidden")
        key = row_keys(seed, prompts, device)
        ids_BT, mask_BS = left_padded([prompt.token_ids for prompt in prompts], pair.pad_id, device)
        logs = [RolloutLog(prompt) for prompt in prompts]
        writing = [True] * len(prompts)
        for position in range(sampling.max_new_tokens):
            logits = student.step(ids_BT, mask_BS)
            if sampling.no_repeat_ngram_size:
                logits = ban_repeated_ngrams(logits, [log.text for log in logs], sampling.no_repeat_ngram_size)
            student_logp = shaped_logp(logits, sampling)
            address = Address(key, torch.full_like(key, position))
            draft = Draft(student_proposal(student_logp, address, greedy=sampling.greedy), student_logp, address)
            teacher_logits = None if teacher is None else teacher.step(ids_BT, mask_BS)
            teacher_logp = None if teacher_logits is None else shaped_logp(teacher_logits, sampling).to(device)
            recorded = self._written(policy, draft, teacher_logp, logs, sampling)
            token = recorded[0]
            columns = [each.tolist() for each in recorded]
            for row, log in enumerate(logs):
                # Rows that have ended stay in the batch and are no longer recorded.
                if writing[row]:
                    log.extend(*(column[row : row + 1] for column in columns))
                    if teacher is not None and teacher.keep_hidden:
                        log.teacher_hidden.append(teacher.hidden_BH[row])
                    if isinstance(keep_teacher, int) and teacher_logits is not None:
                        log.teacher_top.append(top_logp(teacher_logits[row : row + 1], keep_teacher))
                    room = sampling.max_new_tokens - log.prompt.begun - len(log.token_ids)
                    writing[row] = room > 0 and log.token_ids[-1] not in pair.eos_ids
            if not any(writing):
                break
            ids_BT = token[:, None]
            mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BT)], dim=1)
        return [log.rollout(pair.eos_ids, self.hidden_device) for log in logs]

    def _written(
        self, policy: Policy, draft: Draft, teacher_logp: Tensor | None, logs: Sequence[RolloutLog], sampling: Sampling
    ) -> list[Tensor]:
        """The token of each row and what is recorded of it, all (B,), in the order of `RolloutLog.extend`."""
        if teacher_logp is None:
            student_at = draft.student_logp.gather(-1, draft.proposal[:, None])[:, 0]
            check_numbers(student_at, None)
            unknown, nothing = torch.full_like(student_at, math.nan), torch.zeros_like(student_at)
            return [draft.proposal, nothing.bool(), unknown, unknown, student_at, unknown, student_at, nothing]
        compared = compare(draft, teacher_logp)
        positions = observe(policy, draft, compared, logs, sampling)
        decision = policy.decide(positions)
        written = write(decision, draft, compared, greedy=sampling.greedy)
        check_numbers(written.student_logp, positions.divergence)
        models = (written.student_logp, written.teacher_logp, written.law_logp)
        recorded = [written.token, written.by_teacher, positions.divergence, decision.threshold, *models]
        recorded.append(written.teacher_part)
        if self.margin_top_k:
            recorded.append(teacher_margin(draft.student_logp, teacher_logp, self.margin_top_k))
        return recorded
