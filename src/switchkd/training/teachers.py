"""Teachers that cost less memory: the student without its adapter, and one that is away while the student trains."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.models.heads import base_of, evaluating

SELF = "self"
Offload = Literal["none", "cpu", "disk"]


def self_teacher(student: nn.Module) -> PreTrainedModel:
    """The student without its adapter, as a teacher that shares its weights: one copy in memory.

    `student` is a PEFT model, such as one that get_peft_model returns. Raises UserError where it has no adapter.
    """
    if not hasattr(student, "disable_adapter"):
        raise UserError(
            f"teacher {SELF!r} is the student without its adapter, but the student has none; give peft_config (peft in a "
            f"run file)"
        )
    # All that is asked of a teacher is forwarded to the base model.
    return cast(PreTrainedModel, _WithoutAdapter(student, base_of(student)))


class _WithoutAdapter(nn.Module):
    """A module of the student's, run without the adapter and without dropout. It owns no weights: none are moved or frozen."""

    def __init__(self, student: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        # Not registered as submodules: .to, .eval and .requires_grad_ on the teacher must not act on the student.
        self.__dict__["_student"] = student
        self.__dict__["_inner"] = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        student: Any = self.__dict__["_student"]
        with evaluating(student), student.disable_adapter():
            return self.__dict__["_inner"](*args, **kwargs)

    def get_base_model(self) -> PreTrainedModel:
        return base_of(self.__dict__["_student"])

    def get_decoder(self) -> nn.Module:
        return _WithoutAdapter(self.__dict__["_student"], cast(nn.Module, self.get_base_model().get_decoder()))

    def get_output_embeddings(self) -> nn.Module:
        projection = self.get_base_model().get_output_embeddings()
        # Where PEFT trains a copy of the head, the teacher's is the original.
        return cast(nn.Module, getattr(projection, "original_module", projection))


def check_offload(teacher: PreTrainedModel, offload: str) -> None:
    """Raises UserError where `TeacherPlace` knows no such place, or cannot bring the teacher there."""
    if offload not in get_args(Offload):
        raise UserError(f"teacher_offload is {offload!r}; choose one of {', '.join(get_args(Offload))}")
    if _is_quantised(teacher) and offload != "none":
        raise UserError(
            f"teacher_offload is {offload!r}, but quantised weights stay where they were loaded; leave it out"
        )


def _is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


class TeacherPlace:
    """Keeps a teacher's weights elsewhere while nobody asks it: `with place.at_work():` brings them back.

    `offload` "cpu" moves them to the machine's memory, "disk" writes them to a file once (in `folder`, removed at the end)
    and reads them from there. The head stays: the objective projects the kept states through it. See `check_offload`.
    """

    def __init__(self, teacher: PreTrainedModel, offload: str, device: torch.device, folder: Path) -> None:
        self.offload = offload
        self.device = device
        self._depth = 0
        head = {id(parameter) for parameter in base_of(teacher).get_output_embeddings().parameters()}
        self._moved = {name: each for name, each in teacher.named_parameters() if id(each) not in head}
        # Packed weights were put on their device while they were loaded.
        (teacher if _is_quantised(teacher) else cast(nn.Module, teacher).to(device)).eval()
        self._file: Path | None = None
        if offload == "disk" and self._moved:
            folder.mkdir(parents=True, exist_ok=True)
            place = tempfile.mkdtemp(prefix="teacher-", dir=folder)
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self._file = Path(place) / "weights.safetensors"
            # Weights that share memory are one parameter here, and so one entry of the file.
            save_file({name: each.data.contiguous() for name, each in self._moved.items()}, self._file)
        self._leave()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The teacher's weights are on its device inside; may be nested."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._arrive()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    def _arrive(self) -> None:
        if self.offload == "cpu":
            for parameter in self._moved.values():
                parameter.data = parameter.data.to(self.device, non_blocking=True)
        elif self._file is not None:
            with safe_open(self._file, framework="pt", device=str(self.device)) as weights:
                for name, parameter in self._moved.items():
                    parameter.data = weights.get_tensor(name)

    def _leave(self) -> None:
        if self.offload == "cpu":
            for parameter in self._moved.values():
                parameter.data = parameter.data.to("cpu")
        elif self._file is not None:
            for parameter in self._moved.values():
                parameter.data = parameter.data.new_empty(0)
