"""The rollouts of a step, for those who look on while a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.law import Policy
from switchkd.rollout.second_reading import SecondReading, read_again
from switchkd.rollout.speculative import SpeculativeEngine


@dataclass(frozen=True, eq=False)
class WrittenStep:
    """The fresh rollouts of `step`, counted from 1, on this process, and who wrote them how.

    While a step is told of, both models are as they were when they wrote.
    """

    step: int
    rollouts: Sequence[Rollout]
    pair: ModelPair
    writer: Policy
    sampling: Sampling
    seed: int

    def read_again(self, count: int, followed: Sequence[Prompt] = ()) -> list[tuple[Rollout, SecondReading]]:
        """The first `count` rollouts and those that the step's writer makes of `followed`, each with both models' favorites.

        It costs a forward of each model a text, and the rollouts of `followed`. No draw of training changes, and nothing of it is
        measured.
        """
        found = list(self.rollouts[:count])
        if prompts := [prompt for prompt in followed if prompt.begun < self.sampling.max_new_tokens]:
            # Not the run's engine, which measures itself, and may have to make graphs for another number of rows.
            engine = SpeculativeEngine(self.pair, max_rows=len(prompts), compile=False)
            found += engine.generate(prompts, self.writer, self.sampling, self.seed)
        return list(zip(found, read_again(self.pair, found, self.sampling), strict=True))
