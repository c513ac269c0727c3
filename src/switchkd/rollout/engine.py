"""What a rollout engine is: prompts and a policy in, finished rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.law import Policy

PromptLike = str | Sequence[int] | Prompt
Progress = Callable[[int], None]
# An int is the number of the teacher's likeliest ids.
KeepTeacher = Literal["hidden"] | int | None


class Engine(Protocol):
    """Makes rollouts. All engines give the same tokens for the same prompts, policy, sampling and seed."""

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = ...,
        seed: int = ...,
        keep_teacher: KeepTeacher = ...,
        on_progress: Progress | None = ...,
    ) -> list[Rollout]:
        """One rollout for each prompt, in the order of the prompts.

        `keep_teacher="hidden"` keeps the teacher's last hidden state for every token: T x H numbers per rollout, in the
        teacher's dtype and on its device. A number K keeps `teacher_top`, the K likeliest ids with their log-probabilities.
        `on_progress` is called after each step with the number of finished rollouts. Raises
        UserError for prompts, policy and sampling that do not fit the models or one another.
        """
