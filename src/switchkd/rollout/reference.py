"""The oracle: one token at a time, both models, no tricks. Every other engine is tested against this one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from switchkd.distributions.draw import independent_token, student_proposal, teacher_token
from switchkd.distributions.noise import Address, row_keys, shaped_logp
from switchkd.models.heads import evaluating
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
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
    left_padded,
    seen_by,
)
from switchkd.rollout.policies import Policy


class _Decoder:
    """One model with its key/value cache over a left-padded batch, fed one step at a time."""

    def __init__(self, model: PreTrainedModel, vocabulary_size: int, keep_hidden: bool = False) -> None:
        self.model = model
        self.vocabulary_size = vocabulary_size
        self.keep_hidden = keep_hidden
        self.cache = DynamicCache(config=model.config)
        self.hidden_BH = torch.empty(0)

    def step(self, ids_BT: Tensor, mask_BS: Tensor) -> Tensor:
        """Next-token logits (B, V) after `ids_BT`; the mask covers everything fed so far."""
        device = self.model.device
        mask_BS = mask_BS.to(device)
        position_ids = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        output = self.model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BS,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=self.keep_hidden,
            logits_to_keep=1,
        )
        if self.keep_hidden:
            self.hidden_BH = output.hidden_states[-1][:, -1]
        logits: Tensor = output.logits[:, -1, : self.vocabulary_size]
        return logits


class ReferenceEngine:
    """Rolls out one token at a time with one forward of each model a token; batched, left-padded, cached.

    `max_rows` prompts run together (default 64); the result does not depend on it.
    """

    def __init__(self, pair: ModelPair, max_rows: int = 64) -> None:
        check_models(pair)
        self.pair = pair
        self.max_rows = max_rows

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
        check_call(policy, sampling, self.pair.teacher, keep_teacher)
        records = as_prompts(prompts, self.pair.tokenizer, self.pair.vocabulary_size)
        self.pair.check_room(max((len(record.token_ids) for record in records), default=0) + sampling.max_new_tokens)
        rollouts: list[Rollout] = []
        with evaluating(self.pair.student, self.pair.teacher):
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
                written = [[*log.prompt.token_ids, *log.token_ids] for log in logs]
                logits = ban_repeated_ngrams(logits, written, sampling.no_repeat_ngram_size)
            student_logp = shaped_logp(logits, sampling)
            address = Address(key, torch.full_like(key, position))
            token = proposal = student_proposal(student_logp, address, greedy=sampling.greedy)
            by_teacher = torch.zeros_like(token, dtype=torch.bool)
            divergence = threshold = teacher_token_logp = torch.full_like(token, math.nan, dtype=torch.float64)
            if teacher is not None:
                teacher_logp = shaped_logp(teacher.step(ids_BT, mask_BS), sampling).to(device)
                positions = seen_by(
                    policy, proposal, student_logp, teacher_logp, address, logs, sampling.max_new_tokens
                )
                decision = policy.decide(positions)
                divergence, by_teacher, threshold = positions.divergence, decision.by_teacher, decision.threshold
                if policy.draws_anew:
                    drawn = independent_token(teacher_logp, address, greedy=sampling.greedy)
                else:
                    drawn = teacher_token(proposal, student_logp, teacher_logp, address, greedy=sampling.greedy)
                token = torch.where(by_teacher, drawn, proposal)
                teacher_token_logp = teacher_logp.gather(-1, token[:, None])[:, 0]
            student_token_logp = student_logp.gather(-1, token[:, None])[:, 0]
            check_numbers(student_token_logp, divergence if teacher is not None else None)
            for row, log in enumerate(logs):
                if not writing[row]:
                    continue
                log.token_ids.append(int(token[row]))
                log.written_by_teacher.append(bool(by_teacher[row]))
                log.divergence.append(float(divergence[row]))
                log.threshold.append(float(threshold[row]))
                log.student_logp.append(float(student_token_logp[row]))
                log.teacher_logp.append(float(teacher_token_logp[row]))
                if teacher is not None and teacher.keep_hidden:
                    log.teacher_hidden.append(teacher.hidden_BH[row].cpu())
                writing[row] = log.token_ids[-1] not in pair.eos_ids
            if not any(writing):
                break
            ids_BT = token[:, None]
            mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BT)], dim=1)
        return [log.finished(pair.eos_ids) for log in logs]
