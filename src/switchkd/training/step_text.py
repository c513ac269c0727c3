"""The text of an optimiser step: which rows are rolled out, by whom, which are replayed, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from accelerate.utils import gather_object
from transformers import TrainerState

from switchkd.distributions.noise import Address, Stream, row_keys, uniform
from switchkd.methods.config import SwitchConfig
from switchkd.methods.plan import Plan
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Policy, Switch, Teacher
from switchkd.training.adaptive_share import AdaptiveShare
from switchkd.training.auto_threshold import AutoThreshold
from switchkd.training.meters import Meters
from switchkd.training.replay import ReplayBuffer

TEXT_MEASURES = ("student_share", "replayed", "teacher_share", "response_tokens", "ended", "rollout_divergence",
    "rollout_tokens_per_second")  # fmt: skip


class _Coin(IntEnum):
    """A sequence's own draws: their positions come after those of its tokens."""

    ROLLED_OUT = 0
    BY_TEACHER = 1
    REPLAYED = 2
    WHICH = 3


class StepText:
    """Makes the training sequences of each step: every choice is an addressed coin of (seed, row, step).

    `replay` is the buffer of past rollouts, and `share` the schedule of the student's share, where the plan has them.
    """

    def __init__(
        self, plan: Plan, args: SwitchConfig, pair: ModelPair, meters: Meters, examples: Sequence[Example]
    ) -> None:
        self.plan = plan
        self.args = args
        self.pair = pair
        self.meters = meters
        self.replay = ReplayBuffer(plan.replay_capacity) if plan.replay_capacity and plan.rolls_out else None
        self.share = AdaptiveShare(plan.rollout_share, plan.share_rise) if plan.share_rise else None
        self.auto_threshold = None
        if plan.auto_threshold and isinstance(plan.policy, Switch):
            self.auto_threshold = AutoThreshold(args, plan.policy, examples)

    def write(
        self, examples: list[Example], state: TrainerState, engine: Engine, log: Callable[[dict[str, float]], None]
    ) -> list[Example | Rollout]:
        """Each example, or the rollout that stands in for it, in their order."""
        policy = self.auto_threshold.policy_at(state, engine, log) if self.auto_threshold else self.plan.policy
        share = self.share.share_at(state) if self.share else self.plan.rollout_share
        prompts = [Prompt(e.prompt.token_ids, e.prompt.prompt_id, sample_id=state.global_step) for e in examples]
        coins = self._coins(prompts)
        rolled_out = [row for row, coin in enumerate(coins[_Coin.ROLLED_OUT]) if coin < share]
        replayed: list[int] = []
        if self.replay is not None and self.replay.is_full:
            replayed = [row for row in rolled_out if coins[_Coin.REPLAYED][row] < self.plan.replay_share]
        sequences: list[Example | Rollout] = list(examples)
        for row in replayed:
            assert self.replay is not None
            sequences[row] = self.replay.draw(coins[_Coin.WHICH][row])
        fresh = [row for row in rolled_out if row not in set(replayed)]
        by_teacher = [row for row in fresh if coins[_Coin.BY_TEACHER][row] < self.plan.teacher_text_share]
        written: dict[int, Rollout] = {}
        for rows, writer in ((by_teacher, Teacher()), ([row for row in fresh if row not in set(by_teacher)], policy)):
            if rows:
                rollouts = self._roll_out([prompts[row] for row in rows], writer, engine)
                written.update(zip(rows, rollouts, strict=True))
        for row, rollout in written.items():
            sequences[row] = rollout
        if self.share:
            self.meters.add("student_share", share, 1)
        if self.replay is not None:
            if rolled_out:
                self.meters.add("replayed", len(replayed), len(rolled_out))
            # All processes keep, and draw from, the same rollouts.
            self.replay.add(gather_object(list(written.values())))
        return sequences

    def _coins(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Uniforms in (0, 1) for each `_Coin` and row."""
        key = row_keys(self.args.seed, prompts)
        after = self.args.max_new_tokens
        return [uniform(Address(key, torch.full_like(key, after + coin)), Stream.COIN).tolist() for coin in _Coin]

    def _roll_out(self, prompts: list[Prompt], policy: Policy, engine: Engine) -> list[Rollout]:
        started = time.perf_counter()
        # Returns are of what the teacher says of each token, whoever wrote it.
        asks_teacher = policy.needs_teacher or self.plan.objective.long_term_weight > 0
        rollouts = engine.generate(
            prompts,
            policy=policy,
            sampling=self.args.sampling,
            seed=self.args.seed,
            keep_teacher="hidden" if asks_teacher and self.plan.objective.divergence else None,
        )
        self._record(rollouts, policy, time.perf_counter() - started)
        return rollouts

    def _record(self, rollouts: list[Rollout], policy: Policy, seconds: float) -> None:
        add, tokens = self.meters.add, sum(len(rollout.token_ids) for rollout in rollouts)
        add("teacher_share", sum(sum(rollout.written_by_teacher) for rollout in rollouts), tokens)
        add("response_tokens", tokens, len(rollouts))
        add("ended", sum(r.token_ids[-1] in self.pair.eos_ids for r in rollouts), len(rollouts))
        add("rollout_tokens_per_second", tokens, seconds)
        if policy.needs_teacher:
            add("rollout_divergence", sum(sum(rollout.divergence) for rollout in rollouts), tokens)
