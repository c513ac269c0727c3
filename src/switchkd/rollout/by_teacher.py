"""Rollouts with several teachers: each prompt is written with the one that it names, and the results come in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.engine import Engine, KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.rollout.metrics import RolloutMetrics


class EngineByTeacher:
    """An engine for each of several pairs of one student, by the names that prompts give in `Prompt.teacher`.

    `make` makes the engine of a pair; a pair that stands under two names gets one. Draws have addresses, so a rollout is token for
    token what the engine of its own pair gives alone. `keep_teacher` acts where the pair has a teacher here.
    """

    def __init__(self, pairs: Mapping[str, ModelPair], make: Callable[[ModelPair], Engine]) -> None:
        self.pairs = pairs
        self.engines = {pair: make(pair) for pair in dict.fromkeys(pairs.values())}
        self.metrics = RolloutMetrics()

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in their order; see `Engine.generate`. Raises UserError for a name that is not known."""
        pairs = [self._pair_of(index, prompt) for index, prompt in enumerate(prompts)]
        # A teacher that nobody asks changes a text only by the ids that end it, and larger batches are faster.
        asks_teacher = policy.needs_teacher or keep_teacher
        groups = indices_by([pair if asks_teacher else pair.eos_ids for pair in pairs])
        self.metrics = RolloutMetrics()
        rollouts: dict[int, Rollout] = {}
        for group in groups.values():
            pair, finished = pairs[group[0]], len(rollouts)
            engine = self.engines[pair]
            keep = keep_teacher if pair.teacher is not None else None
            told = None if on_progress is None else _after(finished, on_progress)
            made = engine.generate([prompts[index] for index in group], policy, sampling, seed, keep, told)
            rollouts.update(zip(group, made, strict=True))
            if isinstance(metrics := getattr(engine, "metrics", None), RolloutMetrics):
                self.metrics.add(metrics)
        return [rollouts[index] for index in range(len(prompts))]

    def _pair_of(self, index: int, prompt: PromptLike) -> ModelPair:
        name = prompt.teacher if isinstance(prompt, Prompt) else ""
        if name not in self.pairs:
            raise UserError(
                f"prompt {index} names the teacher {name!r}; known are {', '.join(self.pairs)}: set Prompt.teacher to one of them"
            )
        return self.pairs[name]


def indices_by(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The places of each key, in the order in which the keys come first."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return found


def _after(finished: int, told: Progress) -> Progress:
    """`told` of the rollouts of a group that others have gone before."""
    return lambda count: told(finished + count)
