"""`transformers.Trainer` whose student may lie in parts on the processes (FSDP2, ZeRO-3).

Under FSDP2 its checkpoints are those of one process, weights and optimizer whole: a run goes on with any number of processes,
sharded or not. Under ZeRO the weights are saved whole, and what a run goes on with is DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.training.checkpoints import OPTIMIZER_FILE, SCHEDULER_FILE
from switchkd.training.machine import check_sharding, set_up_sharding, sharding_of
from switchkd.training.pushing_trainer import PushingTrainer
from switchkd.training.taught import Taught, first_pair
from switchkd.training.teachers import TeacherPlace
from switchkd.training.whole_student import WholeHead, WholeStudent, load_optimizer_state, whole_optimizer_state


class ShardedTrainer(PushingTrainer):
    """A trainer that reads and saves its student whole. Without parts it is `transformers.Trainer`."""

    args: SwitchConfig
    whole: WholeStudent
    in_parts: bool
    _head: WholeHead
    _places: list[TeacherPlace]

    def create_accelerator_and_postprocess(self) -> None:
        """As in `transformers.Trainer`, with FSDP2 on CPUs too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_sharding(self.accelerator, self.args)

    def _read_whole(self, taught: Mapping[str, Taught]) -> Mapping[str, Taught]:
        """The student with its teachers as rollouts read them, inside `reading` alone.

        Raises UserError for sharding that would not be right.
        """
        pair = first_pair(taught)
        check_sharding(self.accelerator.state, self.args, pair, teachers=len(taught))
        self.in_parts = sharding_of(self.accelerator.state) is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # The trainer leaves it where it is, and whatever is proven before training needs it whole.
            nn.Module.to(pair.student, self.args.device)
        self.whole = WholeStudent(pair, sharded=self.in_parts)
        self._head = WholeHead(pair.student_head.projection)
        folder, offload = Path(str(self.args.output_dir)), self.args.teacher_offload
        teachers = dict.fromkeys(each.pair.teacher for each in taught.values())
        self._places = [TeacherPlace(teacher, offload, self.args.device, folder) for teacher in teachers]
        # A student in parts has one teacher.
        return {"": taught[""]._replace(pair=self.whole.pair)} if self.in_parts else taught

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep all models' weights whole and loaded inside, for the engine and for what reads a teacher; may be nested."""
        with self.whole.gathered(), ExitStack() as loaded:
            for place in self._places:
                loaded.enter_context(place.loaded())
            yield

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`."""
        if resume_from_checkpoint:
            self._load_before_sharding(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `transformers.Trainer`; the head stays whole until its gradient is there."""
        with self._head.kept():
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _as_one_process(self) -> Iterator[None]:
        """Inside, the base class sees the whole student, and neither FSDP nor DeepSpeed. All processes enter at the same time."""
        fsdp, deepspeed, model = self.is_fsdp_enabled, self.is_deepspeed_enabled, self.model
        with self.whole.gathered_to_save(here=self.args.should_save):
            self.is_fsdp_enabled = self.is_deepspeed_enabled = False
            self.model = self.whole.pair.student if self.in_parts else model
            try:
                yield
            finally:
                self.is_fsdp_enabled, self.is_deepspeed_enabled, self.model = fsdp, deepspeed, model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`; a student in parts is saved whole. All processes call it."""
        with self._as_one_process():
            super().save_model(output_dir, _internal_call)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; under FSDP and DeepSpeed from the first step on."""
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.accelerator._models:
            kind = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise UserError(
                f"{kind} takes the student over when training begins; evaluate after train, or without {kind}"
            )
        return super().evaluate(*args, **kwargs)

    def _load_before_sharding(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights while the student is still whole; `_load_from_checkpoint` then finds them there."""
        if not self.is_fsdp_enabled:
            return
        if self.accelerator._models:
            raise UserError("this trainer has trained already, and its student is in parts; resume with a new trainer")
        self.is_fsdp_enabled = False
        try:
            super()._load_from_checkpoint(str(checkpoint), self.model)
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = whole_optimizer_state(self.optimizer, here=self.args.should_save)
        if state is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        # The file's pages, which the processes of a machine share, and not a copy of the whole state for each.
        read = [
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)
            for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        ]
        load_optimizer_state(self.optimizer, read[0])
        self.lr_scheduler.load_state_dict(read[1])
