"""What `calibrate` and `diagnose` show while they roll out: the round, how far it is, and the shares so far."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.status import Status

from switchkd.records import Rollout, Sampling, teacher_share_of
from switchkd.rollout.engine import Engine, KeepTeacher, Progress, PromptLike
from switchkd.rollout.law import Policy
from switchkd.rollout.policies import POLICY, Switch


class WatchedEngine:
    """An engine that says on the console how far each of its calls is, and what came of it."""

    def __init__(self, engine: Engine, console: Console, status: Status) -> None:
        self.engine = engine
        self.console = console
        self.status = status
        self.rounds = 0

    def generate(
        self,
        prompts: Sequence[PromptLike],
        policy: Policy,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        keep_teacher: KeepTeacher = None,
        on_progress: Progress | None = None,
    ) -> list[Rollout]:
        """As the engine does; see `Engine.generate`."""
        self.rounds += 1
        writer = f"threshold {policy.threshold:.3g}" if isinstance(policy, Switch) else POLICY.name_of(type(policy))
        heading = f"round {self.rounds}, {writer}"

        def told(finished: int) -> None:
            self.status.update(f"{heading}: {finished} of {len(prompts)} prompts rolled out")
            if on_progress:
                on_progress(finished)

        told(0)
        rollouts = self.engine.generate(prompts, policy, sampling, seed, keep_teacher, told)
        self.console.print(
            f"{heading}: the teacher wrote {teacher_share_of(rollouts):.1%}", markup=False, soft_wrap=True
        )
        return rollouts
