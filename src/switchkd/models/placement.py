"""Where models live and in what precision they compute: the one place that decides it, for commands and trainer alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch

from switchkd.errors import UserError

# A checkpoint's own type is "auto".
WeightDtype = torch.dtype | Literal["auto"]
Precision = Literal["auto", "float32", "bf16"]

_DTYPES: dict[str, WeightDtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
    "auto": "auto",
}
_PRECISIONS: dict[WeightDtype, Precision] = {"auto": "auto", torch.float32: "float32", torch.bfloat16: "bf16"}
_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Placement:
    """The device of both models, the types of their weights, and the type that float32 is computed in (None: itself).

    `attn_implementation` is that of `from_pretrained`; None leaves the choice to transformers. Raises UserError for a device
    that is not there, and for a type that it does not have.
    """

    device: torch.device
    student_dtype: WeightDtype = torch.float32
    teacher_dtype: WeightDtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        kind, index = self.device.type, self.device.index or 0
        if kind not in _DEVICES:
            raise UserError(
                f"device is '{self.device}'; choose auto, cpu, mps, cuda, or one of several, such as cuda:1"
            )
        if kind == "mps" and not torch.backends.mps.is_available():
            raise UserError("device is 'mps', but torch finds no Metal device here; take auto or cpu")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"device is '{self.device}', but torch finds no CUDA device here; take auto or cpu, or check the driver and "
                f"that torch was built for CUDA"
            )
        if kind == "cuda" and index >= torch.cuda.device_count():
            raise UserError(
                f"device is '{self.device}', but torch finds {torch.cuda.device_count()} CUDA devices, counted from 0"
            )
        if kind == "mps" and torch.float64 in (self.student_dtype, self.teacher_dtype):
            raise UserError("dtype is float64, which the device mps does not have; take float32, or device cpu")

    def init_kwargs(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """A model's own keywords of `from_pretrained`, and the attention of both where it has none."""
        attention = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return {**attention, **(given or {})}

    def describe(self) -> str:
        """Device and precision in a few words."""
        student, teacher = _name(self.student_dtype), _name(self.teacher_dtype)
        computed = f" under {_name(self.autocast_dtype)} autocast" if self.autocast_dtype else ""
        return f"on {self.device} in {student}{computed}" + (f", teacher in {teacher}" if teacher != student else "")


class PlacementSettings(TypedDict, total=False):
    """The keywords of `placement_of`."""

    device: str
    precision: str
    dtype: str | torch.dtype | None
    teacher_dtype: str | torch.dtype | None
    attn_implementation: str | None
    model_init_kwargs: Mapping[str, Any] | None
    teacher_model_init_kwargs: Mapping[str, Any] | None


def placement_of(
    *,
    device: str = "auto",
    precision: str = "auto",
    dtype: str | torch.dtype | None = None,
    teacher_dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    teacher_model_init_kwargs: Mapping[str, Any] | None = None,
) -> Placement:
    """The placement that settings ask for; raises UserError for an unknown name.

    `device` auto is cuda, then mps, then cpu; "cuda" is the process's own under a launcher. `precision` auto is bf16 on CUDA:
    the student in float32 under bf16 autocast, the teacher in bf16; float32 everywhere else. `dtype` and `teacher_dtype` (or
    those in the init kwargs) are the types of the weights, where they are to be others.
    """
    place = _device_named(device)
    student = torch_dtype(dtype or init_options(model_init_kwargs).get("dtype") or torch.float32)
    teacher = teacher_dtype or init_options(teacher_model_init_kwargs).get("dtype")
    wanted = precision_named(precision)
    # Somebody who asks for float64 or float16 weights wants them computed in their own type.
    fits = student not in (torch.float64, torch.float16)
    lowered = wanted == "bf16" or (wanted == "auto" and fits and _has_bf16(place))
    autocast = torch.bfloat16 if lowered else None
    # A frozen teacher loses nothing by weights in the type that it computes in, and takes half the memory.
    teacher = torch_dtype(teacher, "teacher_dtype") if teacher else autocast or student
    return Placement(place, student, teacher, autocast, attn_implementation)


def torch_dtype(name: str | torch.dtype, key: str = "dtype") -> WeightDtype:
    """The type of weights that a name means, short or long; "auto" stays. Raises UserError for an unknown one."""
    found = name if isinstance(name, torch.dtype) else _DTYPES.get(str(name).removeprefix("torch."))
    if found is None or found not in _DTYPES.values():
        raise UserError(f"{key} {str(name)!r} is not known; choose float32, bfloat16, float16, float64 or auto")
    return found


def precision_named(name: str) -> Precision:
    """The precision that a name means, short or long. Raises UserError for an unknown one."""
    found = _PRECISIONS.get(_DTYPES.get(name, torch.float16))
    if found is None:
        raise UserError(f"precision is {name!r}; choose auto, float32 or bf16 (weights in another type: dtype)")
    return found


def init_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keywords of `from_pretrained` as they are given to it: `torch_dtype` under its newer name, types no longer names."""
    options = dict(given or {})
    older, newer = options.pop("torch_dtype", None), options.pop("dtype", None)
    if dtype := newer or older:
        options["dtype"] = torch_dtype(dtype)
    return options


def _device_named(name: str) -> torch.device:
    if name == "auto":
        # What `accelerate launch --cpu` sets, and transformers reads.
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            name = "cpu"
        else:
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; choose auto, cpu, mps, cuda, or one of several, such as cuda:1") from None


def _has_bf16(device: torch.device) -> bool:
    # Cards before Ampere emulate it, slower than float32.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _name(dtype: WeightDtype | None) -> str:
    return "its own type" if dtype == "auto" else str(dtype).removeprefix("torch.")
