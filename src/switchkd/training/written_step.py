"""The rollouts of a step, for those who look on while a run trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.by_teacher import EngineByTeacher
from switchkd.rollout.law import Policy
from switchkd.rollout.second_reading import SecondReading, read_again
from switchkd.rollout.speculative import SpeculativeEngine


@dataclass(frozen=True, eq=False)
class WrittenStep:
    """The fresh rollouts of `step`, counted from 1, on this process, and who wrote them how; `pairs` are by the teacher's name.

    While a step is told of, all models are as they were when they wrote.
    """

    step: int
    rollouts: Sequence[Rollout]
    pairs: Mapping[str, ModelPair]
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
            engine = EngineByTeacher(
                self.pairs, lambda pair: SpeculativeEngine(pair, max_rows=len(prompts), compile=False)
            )
            found += engine.generate(prompts, self.writer, self.sampling, self.seed)
        return [
            (each, reading)
            for each in found
            for reading in read_again(self.pairs[each.prompt.teacher], [each], self.sampling)
        ]
