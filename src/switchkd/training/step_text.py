"""The text of an optimizer step: which rows are rolled out, by whom, which are replayed, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from itertools import count
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import TrainerState

from switchkd.distributions.noise import Address, Stream, row_keys, uniform
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, FinishReason, Prompt, Rollout, Sampling
from switchkd.rollout.engine import Engine, KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy, Teacher
from switchkd.rollout.policies import Switch
from switchkd.training.adaptive_share import AdaptiveShare
from switchkd.training.auto_threshold import CalibratedPolicy, calibration_prompts
from switchkd.training.meters import Meters
from switchkd.training.replay import ReplayBuffer
from switchkd.training.rewriting import rewritten
from switchkd.training.written_step import WrittenStep

TEXT_MEASURES = (
    "student_share",
    "replayed",
    "teacher_share",
    "response_tokens",
    "ended",
    "rollout_divergence",
    "rollout_tokens_per_second",
)


class _Coin(IntEnum):
    """The draws of a whole sequence, by the number that each has."""

    ROLLED_OUT = 0
    BY_TEACHER = 1
    REPLAYED = 2
    WHICH = 3
    PREFIX = 4


class _ToldEngine:
    """The engine, which tells of each call how many of its rollouts are finished, and how many there are to be."""

    def __init__(self, engine: Engine, told: Callable[[int, int], None]) -> None:
        self.engine = engine
        self.told = told

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        total = len(prompts)
        told = on_progress or (lambda finished: self.told(finished, total))
        return self.engine.generate(prompts, policy, sampling, seed, keep_teacher, told)


class WrittenText(NamedTuple):
    """What a step trains on, and those of it that were rolled out for it, without the teacher's states, which are large."""

    sequences: Sequence[Example | Rollout]
    rollouts: Sequence[Rollout]


class StepText:
    """Makes the training sequences of each step. Every choice is an addressed coin of (seed, row, step).

    `pairs` are by the teacher's name. `replay` is the buffer of past rollouts, and `share` the schedule of the student's share, if
    the plan has them.
    """

    def __init__(
        self, args: SwitchConfig, pairs: Mapping[str, ModelPair], meters: Meters, examples: Sequence[Example]
    ) -> None:
        self.args = args
        self.plan = plan = args.plan
        self.pairs = pairs
        self.meters = meters
        # On their way into the replay.
        self._fresh: list[Rollout] = []
        # Told the rollouts that are finished, and how many there are to be.
        self.on_progress: Callable[[int, int], None] | None = None
        # Told the rollouts of each step once they are there.
        self.on_written: Callable[[WrittenStep], None] | None = None
        self.replay = ReplayBuffer(plan.replay_capacity) if plan.replay_capacity and plan.rolls_out else None
        self.share = AdaptiveShare(plan.rollout_share, plan.share_rise) if plan.share_rise else None
        self.calibrated = None
        if plan.auto_threshold and isinstance(plan.policy, Switch):
            prompts = calibration_prompts(examples, plan.auto_threshold.prompts)
            self.calibrated = CalibratedPolicy(plan.auto_threshold, plan.policy, args, prompts)

    def sequences_of_steps(
        self,
        steps: Sequence[Sequence[Example]],
        state: TrainerState,
        engine: Engine,
        log: Callable[[dict[str, float]], None],
    ) -> list[WrittenText]:
        """The text of the step that `state` is at and of those after it, from the examples of each.

        All of it is written as at the first of them; each row has the address of its own step.
        """
        engine = _ToldEngine(engine, self.on_progress) if self.on_progress else engine
        limit = self.plan.longest_rollout(state.global_step, self.args.max_new_tokens)
        policy = self.calibrated.policy_at(state, engine, log, limit) if self.calibrated else self.plan.policy
        policy = policy.at_step(state.global_step)
        share = self.share.share_at(state) if self.share else self.plan.rollout_share
        examples = [example for step in steps for example in step]
        number = [state.global_step + after for after, step in enumerate(steps) for _ in step]
        prompts = [replace(each.prompt, sample_id=step) for each, step in zip(examples, number, strict=True)]
        coins = self._coins(prompts)
        rolled_out = [row for row, coin in enumerate(coins[_Coin.ROLLED_OUT]) if coin < share]
        replayed = self._replayed(rolled_out, coins)
        fresh = [row for row in rolled_out if row not in replayed]
        by_teacher = [row for row in fresh if coins[_Coin.BY_TEACHER][row] < self.plan.teacher_text_share]
        by_policy = [row for row in fresh if row not in set(by_teacher)]
        if self.plan.replayed_prefix:
            progress = state.global_step / max(1, state.max_steps)
            for row in by_policy:
                prompts[row] = self._begun(
                    prompts[row], examples[row].response_ids[:limit], coins[_Coin.PREFIX][row], progress
                )
        written: dict[int, Rollout] = {}
        for rows, writer in ((by_teacher, Teacher()), (by_policy, policy)):
            if rows:
                rollouts = self._roll_out([prompts[row] for row in rows], writer, engine, limit)
                written.update(zip(rows, rollouts, strict=True))
        if self.share:
            self.meters.add("student_share", share, 1)
        if self.replay is not None:
            if rolled_out:
                self.meters.add("replayed", len(replayed), len(rolled_out))
            self._fresh = [rollout.to("cpu") for rollout in written.values()]
        in_place: dict[int, Example | Rollout] = {**replayed, **written}
        if self.plan.rewrite:
            rewrites = rewritten(self.plan.rewrite, [*written.values()], self.pairs, engine, self.args, limit)
            in_place |= dict(zip(written, rewrites, strict=True))
        texts = _of_steps(steps, in_place, written, limit)
        self._tell(texts, state.global_step, policy if by_policy else Teacher(), limit)
        return texts

    def _tell(self, texts: Sequence[WrittenText], step: int, writer: Policy, limit: int) -> None:
        """Tell of the rollouts of each step, those of `step` first."""
        if self.on_written is None:
            return
        sampling = replace(self.args.sampling, max_new_tokens=limit)
        for number, text in enumerate(texts, step + 1):
            if text.rollouts:
                self.on_written(WrittenStep(number, text.rollouts, self.pairs, writer, sampling, self.args.seed))

    def _begun(self, prompt: Prompt, response: tuple[int, ...], coin: float, progress: float) -> Prompt:
        """The prompt with the first part of a response behind it, which leaves at least one token of it to write."""
        begin = self.plan.replayed_prefix
        assert begin is not None
        length = min(begin.tokens(coin, len(response), progress), max(0, len(response) - 1))
        begun_ids = prompt.token_ids + response[:length]
        return replace(prompt, token_ids=begun_ids, begun=length, trains_beginning=begin.weight > 0)

    def keep_scored(self, sequences: Sequence[Example | Rollout]) -> None:
        """Keep the fresh rollouts for the replay, and all that the teacher has read beside them.

        Not before it is read: where the teacher is out of reach, the text is written again, and must not be kept twice. Each
        process keeps what its own teacher read.
        """
        if self.replay is not None:
            # All processes keep, and draw from, the same rollouts.
            self.replay.add(gather_object(self._fresh))
            self._fresh = []
            self.replay.put_back(each for each in sequences if isinstance(each, Rollout))

    def _coins(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Uniforms in (0, 1) for each `_Coin` and row."""
        key = row_keys(self.args.seed, prompts)
        # Tokens have the addresses before.
        after = self.args.max_new_tokens
        return [uniform(Address(key, torch.full_like(key, after + coin)), Stream.COIN).tolist() for coin in _Coin]

    def _replayed(self, rolled_out: Sequence[int], coins: Sequence[Sequence[float]]) -> dict[int, Rollout]:
        """The kept rollouts that take the place of fresh ones, by row."""
        # Before the buffer is full, a few rollouts would come up again and again.
        if self.replay is None or not self.replay.is_full:
            return {}
        drawn = [row for row in rolled_out if coins[_Coin.REPLAYED][row] < self.plan.replay_share]
        return {row: self.replay.draw(coins[_Coin.WHICH][row]) for row in drawn}

    def _roll_out(self, prompts: list[Prompt], policy: Policy, engine: Engine, limit: int) -> list[Rollout]:
        started, plan = time.perf_counter(), self.plan
        # Returns and some weights are of what the teacher says of each token, whoever wrote it.
        asks_teacher = (policy.needs_teacher or plan.objective.reads_logp) and not plan.rewrite
        # One on a server reads finished texts alone, see `StepLoss.scored`.
        asks_teacher = asks_teacher and any(pair.teacher is not None for pair in self.pairs.values())
        rollouts = engine.generate(
            prompts,
            policy=policy,
            sampling=replace(self.args.sampling, max_new_tokens=limit),
            seed=self.args.seed,
            keep_teacher=plan.kept_of_teacher if asks_teacher and plan.objective.divergence else None,
        )
        if plan.replayed_prefix and plan.replayed_prefix.weight:
            # The states of the prefix are not among them: the teacher reads these texts whole.
            unread: Any = {"teacher_hidden": None, "teacher_top": None}
            rollouts = [replace(each, **unread) if each.prompt.begun else each for each in rollouts]
        seconds = time.perf_counter() - started
        # Sums and counts, not shares: the means are over all processes and all steps of a log line.
        add, tokens = self.meters.add, sum(len(rollout.token_ids) for rollout in rollouts)
        add("rollout_tokens_per_second", tokens, seconds)
        add("teacher_share", sum(rollout.teacher_tokens for rollout in rollouts), tokens)
        add("response_tokens", tokens, len(rollouts))
        add("ended", sum(r.finish_reason == FinishReason.END_OF_TEXT for r in rollouts), len(rollouts))
        if policy.needs_teacher:
            add("rollout_divergence", sum(sum(rollout.divergence) for rollout in rollouts), tokens)
        return rollouts


def _of_steps(
    steps: Sequence[Sequence[Example]],
    in_place: Mapping[int, Example | Rollout],
    written: Mapping[int, Rollout],
    limit: int,
) -> list[WrittenText]:
    """The text of each step; `in_place` and `written` are by row, counted over all steps."""
    texts, row = [], count()
    for step in steps:
        numbered = [(next(row), example) for example in step]
        fresh = [written[index] for index, _ in numbered if index in written]
        # Behind the last token that counts, nothing is read.
        sequences = [in_place.get(index, _cut(example, limit)) for index, example in numbered]
        texts.append(WrittenText(sequences, [replace(each, teacher_hidden=None, teacher_top=None) for each in fresh]))
    return texts


def _cut(example: Example, limit: int) -> Example:
    """The example, its response at most `limit` tokens long."""
    if len(example.response_ids) <= limit:
        return example
    hidden = None if example.teacher_hidden is None else example.teacher_hidden[:limit]
    top = None if example.teacher_top is None else example.teacher_top.at(slice(limit))
    return replace(example, response_ids=example.response_ids[:limit], teacher_hidden=hidden, teacher_top=top)
