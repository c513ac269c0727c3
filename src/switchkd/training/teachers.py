"""Teachers that cost less memory: the student without its adapter, and weights kept elsewhere while the student trains."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.methods.config import Offload, SwitchConfig
from switchkd.models.heads import base_of, evaluating
from switchkd.models.pair import ModelPair, parameter_count
from switchkd.training.machine import is_spread
from switchkd.training.shared_teacher import SharedTeacher

SELF = "self"


def self_teacher(student: nn.Module) -> PreTrainedModel:
    """The student without its adapter, as a teacher that shares its weights: one copy in memory.

    `student` is a PEFT model, such as one that get_peft_model returns. Raises UserError where it has no adapter.
    """
    if not hasattr(student, "disable_adapter"):
        raise UserError(
            f"teacher {SELF!r} is the student without its adapter, but the student has none; give peft_config (peft in a run file)"
        )
    # Not a PreTrainedModel, but it passes on everything that a teacher needs to its base model.
    return cast(PreTrainedModel, _WithoutAdapter(student, base_of(student)))


def is_own_student(teacher: nn.Module | None) -> bool:
    """Whether a teacher is its student without the adapter."""
    return isinstance(teacher, _WithoutAdapter)


class _WithoutAdapter(nn.Module):
    """A module of the student's, run without adapter and dropout. It owns no weights, so moving or freezing it does nothing."""

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


def teacher_size(pair: ModelPair) -> int:
    """The number of the teacher's parameters: of a student without its adapter, those of the student that do not train."""
    if pair.teacher is None:
        return 0
    trained = (parameter.numel() for parameter in pair.student.parameters() if parameter.requires_grad)
    # A student without its adapter owns no weights.
    return parameter_count(pair.teacher) or parameter_count(pair.student) - sum(trained)


def loading_options(args: SwitchConfig) -> dict[str, Any] | None:
    """The keywords of `from_pretrained` for a teacher by name: one that is to be shared is loaded into the machine's memory."""
    given = args.teacher_model_init_kwargs
    return {"device_map": {"": "cpu"}, **(given or {})} if args.teacher_offload == "shared" else given


class TeacherPlace:
    """Keeps a teacher's weights elsewhere while nobody reads it: `with place.loaded():` brings them back. Freezes the teacher.

    `offload` "cpu" keeps one copy in the machine's memory, and drops the device's. "disk" writes them to a file in `folder` once
    and reads them from there; the file is removed at the end. The head stays: the objective projects the kept states through it.
    "shared" spreads its layers over the processes (shared_teacher.py). Without a teacher nothing is moved; one with a device_map
    stays where that put it. Raises UserError for an unknown `offload`, and for a teacher that would have to move but cannot: a
    quantized one, one on several devices, or to share one that is its own student; and for one that is in parts already.
    """

    def __init__(self, teacher: PreTrainedModel | None, offload: Offload, device: torch.device, folder: Path) -> None:
        if offload not in get_args(Offload):
            raise UserError(f"teacher_offload is {offload!r}; choose one of {', '.join(get_args(Offload))}")
        self.offload = offload
        self._depth = 0
        self._moved: dict[str, nn.Parameter] = {}
        self._on_host: dict[str, Tensor] = {}
        self._file: Path | None = None
        self._shared: SharedTeacher | None = None
        if teacher is None:
            return
        if any(isinstance(each, DTensor) for each in teacher.parameters()):
            raise UserError(
                "the teacher is in parts already, but the processes do not read it equally often, and would wait for each other; "
                "give it whole, with teacher_offload: shared"
            )
        quantized = bool(getattr(teacher, "is_quantized", False))
        if offload != "none" and (quantized or is_spread(teacher)):
            kind = "quantized weights" if quantized else "the weights of a teacher on several devices"
            raise UserError(f"teacher_offload is {offload!r}, but {kind} stay where they were loaded; leave it out")
        if offload == "shared":
            if is_own_student(teacher):
                raise UserError(
                    f"teacher_offload is 'shared', but teacher {SELF!r} has no weights of its own; leave it out"
                )
            self._shared = SharedTeacher(teacher.eval().requires_grad_(False), device)
            return
        # Packed weights, and those with a device_map, were put on their device while they were loaded.
        stays = quantized or getattr(teacher, "hf_device_map", None)
        (teacher if stays else cast(nn.Module, teacher).to(device)).eval().requires_grad_(False)
        self.device = next((each.device for each in teacher.parameters()), device)
        head = {id(parameter) for parameter in base_of(teacher).get_output_embeddings().parameters()}
        self._moved = {name: each for name, each in teacher.named_parameters() if id(each) not in head}
        if offload == "disk" and self._moved:
            folder.mkdir(parents=True, exist_ok=True)
            place = tempfile.mkdtemp(prefix="_teacher-", dir=folder)
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self._file = Path(place) / "weights.safetensors"
            # Weights that share memory are one parameter here, and so one entry of the file.
            save_file({name: each.data.contiguous() for name, each in self._moved.items()}, self._file)
        if offload == "cpu":
            self._on_host = {name: _host_copy(each.data) for name, each in self._moved.items()}
        self._unload()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Keep the teacher's weights on its device inside; may be nested."""
        self._depth += 1
        shared = self._shared.open() if self._shared is not None and self._depth == 1 else nullcontext()
        try:
            if self._depth == 1:
                self._load()
            with shared:
                yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._unload()

    def _load(self) -> None:
        if self.offload == "cpu":
            for name, parameter in self._moved.items():
                parameter.data = self._on_host[name].to(self.device, non_blocking=True)
        elif self._file is not None:
            with safe_open(self._file, framework="pt", device=str(self.device)) as weights:
                for name, parameter in self._moved.items():
                    parameter.data = weights.get_tensor(name)

    def _unload(self) -> None:
        if self.offload == "cpu":
            # They are frozen, so the copy on the host is still true.
            for name, parameter in self._moved.items():
                parameter.data = self._on_host[name]
        elif self._file is not None:
            for parameter in self._moved.values():
                parameter.data = parameter.data.new_empty(0)


def _host_copy(weight: Tensor) -> Tensor:
    """The weight on the CPU; for a GPU in pinned memory, from which it is copied fastest and without waiting."""
    copy = weight.to("cpu")
    return copy.pin_memory() if weight.device.type == "cuda" else copy
