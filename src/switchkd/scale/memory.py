"""The bytes that each part of a run holds on one device, by a formula: the one place for it.

Rollout, forward with loss, and backward take turns, so a device needs what lasts and the largest of the three. What a formula
leaves out: the driver, the allocator's gaps, and a framework's buffers that are not named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from switchkd.loss.chunked import PIECES_OF_A_CHUNK_ON_CPU
from switchkd.models.memory import AT_LEAST, BYTES_A_NUMBER
from switchkd.rollout.graphs import bucket, weights_stay
from switchkd.scale.sizes import ModelSize

# How the student is spread: a copy on each process, with ZeRO's parts of optimizer and gradients, or in parts itself.
Spread = Literal["ddp", "zero1", "zero2", "fsdp2"]
# Where the teacher is: on every device, in the machine's memory between rollouts, in parts on the processes, or by layers over the
# devices of one process.
TeacherAt = Literal["each", "cpu", "shared", "device_map"]

Parts = dict[str, int]


@dataclass(frozen=True)
class Bytes:
    """The bytes of a number: in the student's weights, in the teacher's, and in what both compute in.

    `pieces` is the number of parts in which the loss compares a chunk of logits (loss/chunked.py).
    """

    student: int = 4
    teacher: int = 2
    computing: int = 2
    pieces: int = 1


CPU_FLOAT32 = Bytes(4, 4, 4, PIECES_OF_A_CHUNK_ON_CPU)


@dataclass(frozen=True)
class Load:
    """What one process does in a step: its `texts` of prompt and response, in tokens, and how many of them at once.

    `rollout_rows` are in flight in a rollout, `rows` in a training forward; `checkpointing` keeps the inputs of layers only.
    `keeps_states` is off for methods that compare with no teacher. The texts of `rollout_steps` steps are written at once. `block`
    tokens are drafted at a time, and at most `largest` (None: as many). `graphs` says that CUDA writes with graphs.
    """

    texts: int
    prompt: int = 256
    response: int = 256
    rollout_rows: int = 64
    rows: int = 8
    checkpointing: bool = False
    block: int = 4
    keeps_states: bool = True
    rollout_steps: int = 1
    largest: int | None = None
    graphs: bool = False

    @property
    def written_at_once(self) -> int:
        """The texts that one call of the engine writes."""
        return self.texts * self.rollout_steps

    @property
    def slots(self) -> int:
        """The positions of a cache's row."""
        least = self.prompt + self.response + (self.block if self.largest is None else self.largest)
        return bucket(least) if self.graphs else least

    @property
    def cached_rows(self) -> int:
        """The rows of a cache, with those that hold nothing."""
        rows = min(self.rollout_rows, self.written_at_once)
        # As `Graphs.rows` pads them.
        return 1 << (rows - 1).bit_length() if self.graphs else rows


@dataclass(frozen=True)
class Split:
    """How a run is laid over `processes`. With a `device_map` one process has `devices` of them to itself."""

    spread: Spread = "ddp"
    processes: int = 1
    teacher: TeacherAt = "each"
    devices: int = 1

    @property
    def compiles(self) -> bool:
        """Whether a run's text is written with graphs on CUDA."""
        offload = self.teacher if self.teacher in ("cpu", "shared") else "none"
        return weights_stay(in_parts=self.spread == "fsdp2", teacher_offload=offload)


def lasting(student: ModelSize, teacher: ModelSize | None, load: Load, split: Split, numbers: Bytes) -> Parts:
    """What is there from the first step to the last, by part. `rollout_rows` of 0 stands for a method without rollouts."""
    among = split.processes
    parts = {
        "student weights": student.parameters * numbers.student // (among if split.spread == "fsdp2" else 1),
        "optimizer": 2 * student.trained * numbers.student // (1 if split.spread == "ddp" else among),
        "student cache": cache_bytes(student, load, numbers),
    }
    if split.spread == "ddp" and among > 1:
        # The tensors that it sums over the processes are copies of the gradients.
        parts["gradients in flight"] = student.trained * numbers.student
    if teacher is not None:
        layers, whole = teacher.layers * teacher.layer, teacher.weight_bytes(numbers.teacher)
        weights = {
            "each": whole,
            "cpu": teacher.head * numbers.teacher,
            "shared": (layers // among + teacher.outside) * numbers.teacher,
            "device_map": whole // split.devices,
        }[split.teacher]
        parts |= {
            "teacher weights": weights,
            "teacher cache": cache_bytes(teacher, load, numbers) // split.devices,
        }
        if load.keeps_states:
            parts["kept teacher states"] = load.written_at_once * load.response * teacher.hidden * numbers.computing
    return parts


def cache_bytes(model: ModelSize, load: Load, numbers: Bytes) -> int:
    """The keys and values of a model's texts in flight."""
    return model.cached(load.cached_rows, load.slots) * numbers.computing


def rolling_out(student: ModelSize, teacher: ModelSize | None, load: Load, split: Split, numbers: Bytes) -> Parts:
    """What a rollout adds to what lasts, by part."""
    parts = {}
    if split.spread == "fsdp2":
        # Linear layers in the type that they compute in, the others in their own.
        others = student.parameters - student.linear
        parts["gathered student"] = student.linear * numbers.computing + others * numbers.student
    if numbers.computing != numbers.student:
        lowered = student.linear if split.spread == "fsdp2" else 0
        parts["student in bf16"] = (student.multiplied - lowered) * numbers.computing
    if teacher is not None and split.teacher == "cpu":
        parts["teacher weights, loaded"] = (teacher.parameters - teacher.head) * numbers.teacher
    if teacher is not None and split.teacher == "shared":
        parts["a layer of the teacher"] = teacher.layer * numbers.teacher
    # At most half of the free memory, so this is what it can do with.
    compared = load.cached_rows * load.block * student.vocabulary
    parts["comparison"] = min(compared, AT_LEAST) * BYTES_A_NUMBER
    return parts


def with_loss(student: ModelSize, load: Load, split: Split, numbers: Bytes) -> Parts:
    """What a training forward and its loss add to what lasts, by part; no gradient but the head's is there yet."""
    positions = min(load.rows, load.texts) * load.response
    chunk = max(16, AT_LEAST // student.vocabulary)
    piece = min(chunk // numbers.pieces, positions)
    head = student.head * 4 if student.trained == student.parameters else 0
    return {
        **_computed_with(student, split, numbers),
        "activations": activation_bytes(student, load, numbers),
        "loss": head + (4 * min(chunk, positions) + _BYTES_A_LOGIT * piece) * student.vocabulary,
    }


def backward(student: ModelSize, load: Load, split: Split, numbers: Bytes) -> Parts:
    """What a backward adds to what lasts, by part: at its end all gradients, and the activations of one layer."""
    among, whole = split.processes, student.trained * numbers.student
    parts = _computed_with(student, split, numbers)
    parts["gradients"] = whole // (among if split.spread in ("zero2", "fsdp2") else 1)
    if split.spread in ("zero1", "zero2"):
        # ZeRO-1 sums in the type of its optimizer's state, ZeRO-2 in that of the gradients.
        parts["gradients in flight"] = ZERO_BUCKET * (numbers.student if split.spread == "zero1" else numbers.computing)
    elif split.spread == "fsdp2":
        # Before they are taken apart.
        parts["gradients in flight"] = (student.layer + student.outside) * numbers.computing
    parts["activations of a layer"] = _layer_activations(student, load, numbers)
    return parts


def _computed_with(student: ModelSize, split: Split, numbers: Bytes) -> Parts:
    if split.spread == "fsdp2":
        # The layer that runs and the next, and what lies outside layers.
        return {"gathered weights": (2 * student.layer + student.outside) * numbers.computing}
    lowered = numbers.computing != numbers.student
    return {"student in bf16": student.multiplied * numbers.computing} if lowered else {}


# At the peak of a training comparison: six float32 tensors of the logits' size and two masks.
_BYTES_A_LOGIT = 26
# Numbers in the buffer that ZeRO-1 and 2 sum gradients in: DeepSpeed's reduce_bucket_size where nothing sets it.
ZERO_BUCKET = 500_000_000


def activation_bytes(student: ModelSize, load: Load, numbers: Bytes) -> int:
    """What autograd keeps of a forward for its backward: of each layer all it needs, or with checkpointing its input alone.

    Counted for layers of the Llama kind (two RMS norms, gated inner layer, fused attention). Norms compute in float32.
    """
    tokens = min(load.rows, load.texts) * (load.prompt + load.response)
    last_norm = tokens * student.hidden * (4 + 4)
    if load.checkpointing:
        return student.layers * tokens * student.hidden * numbers.computing + last_norm
    return student.layers * _layer_activations(student, load, numbers) + last_norm


def _layer_activations(student: ModelSize, load: Load, numbers: Bytes) -> int:
    tokens = min(load.rows, load.texts) * (load.prompt + load.response)
    queries, keys = student.heads * student.head_size, student.kv_heads * student.head_size
    normed = 2 * student.hidden * (4 + 4 + numbers.computing)
    attention = (3 * queries + 2 * keys) * numbers.computing
    return tokens * (normed + attention + 4 * student.inner * numbers.computing)


def needed(lasting: Parts, *phases: Parts) -> int:
    """The bytes that a device needs at most at a time: what lasts, and the largest of the phases, which take turns."""
    return sum(lasting.values()) + max(sum(each.values()) for each in phases)
