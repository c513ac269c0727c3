"""The fastest way to lay a run over a cluster that fits, by the formulas of memory.py and cost.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from switchkd.errors import UserError
from switchkd.rollout.blocks import BlockChooser, BlockCost, ForwardCost
from switchkd.scale.cost import Clock, Cluster
from switchkd.scale.memory import (
    Load,
    Parts,
    Split,
    Spread,
    TeacherAt,
    backward,
    lasting,
    needed,
    rolling_out,
    with_loss,
)
from switchkd.scale.sizes import ModelSize

_MOST_ROWS = 256
# Times this near to each other are no reason for a split that needs more: no assumption is that exact.
_ALIKE = 1.02


@dataclass(frozen=True)
class Job:
    """A step of a run: `texts` over all processes, each of `prompt` and `response` tokens at most.

    The texts of `rollout_steps` steps are written at once.
    """

    texts: int = 64
    prompt: int = 256
    response: int = 256
    rollout_steps: int = 1


@dataclass(frozen=True)
class Option:
    """A split with the largest batches that fit, or, where none does, with the smallest: then `fits` is False.

    `memory` holds bytes on the fullest device: what lasts, and what a rollout, a forward with its loss and a backward add.
    `seconds` are those of a step, by part.
    """

    split: Split
    load: Load
    memory: tuple[Parts, Parts, Parts, Parts]
    seconds: dict[str, float]
    fits: bool

    @property
    def bytes(self) -> int:
        """The most that a device holds at a time."""
        return needed(*self.memory)

    @property
    def time(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    @property
    def largest(self) -> tuple[str, int]:
        """The part that takes most."""
        return max(((name, size) for parts in self.memory for name, size in parts.items()), key=lambda each: each[1])

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values; bytes and seconds."""
        phases = zip(("lasting", "rollout", "loss", "backward"), self.memory, strict=True)
        return {
            "fits": self.fits,
            **asdict(self.split),
            "load": asdict(self.load),
            "bytes": self.bytes,
            "bytes_by_part": dict(phases),
            "seconds": self.time,
            "seconds_by_part": self.seconds,
        }


def plan(student: ModelSize, teacher: ModelSize, job: Job, clock: Clock) -> list[Option]:
    """An option for every split, those that fit first, the fastest first; of those within 2 % of it, the plainest.

    Raises UserError where the vocabularies are far apart, and for a student with quantized weights.
    """
    if min(student.vocabulary, teacher.vocabulary) < 0.9 * max(student.vocabulary, teacher.vocabulary):
        raise UserError(
            f"{student.name} scores {student.vocabulary:,} ids and {teacher.name} {teacher.vocabulary:,}: they are not of one "
            f"tokenizer's family; take a pair that is"
        )
    if student.packed:
        raise UserError(
            f"{student.name} has quantized weights, which do not train; give the model that it was made from"
        )
    options = [
        _best_of(student, teacher, job, clock, split)
        for split in splits(clock.cluster)
        # Quantized weights stay where they were loaded.
        if not (teacher.packed and split.teacher in ("cpu", "shared"))
    ]
    fastest = min((each.time for each in options if each.fits), default=0.0)
    # Stable: what is as good as the fastest stands as `splits` has it, DDP first.
    return sorted(
        options, key=lambda each: (not each.fits, max(each.time, _ALIKE * fastest) if each.fits else each.bytes)
    )


def splits(cluster: Cluster) -> Iterator[Split]:
    """Every way to spread the student and to place the teacher that switchkd can run on that number of devices."""
    for spread, teacher in product(get_args(Spread), get_args(TeacherAt)):
        if teacher == "device_map":
            # One process that has all devices, so there is nothing to spread the student over.
            if spread == "ddp" and cluster.gpus > 1:
                yield Split("ddp", 1, "device_map", cluster.gpus)
        elif cluster.gpus > 1 or (spread == "ddp" and teacher != "shared"):
            yield Split(spread, cluster.gpus, teacher)


def _best_of(student: ModelSize, teacher: ModelSize, job: Job, clock: Clock, split: Split) -> Option:
    options = [_option(student, teacher, load, clock, split) for load in _loads(job, split)]
    fitting = [each for each in options if each.fits]
    return min(fitting, key=lambda each: each.time) if fitting else min(options, key=lambda each: each.bytes)


def _loads(job: Job, split: Split) -> Iterator[Load]:
    texts = -(-job.texts // split.processes)
    written, trained = (_sizes(most) for most in (texts * job.rollout_steps, texts))
    graphs = split.compiles
    largest = BlockChooser(
        "auto", job.response, cost=BlockCost(ForwardCost()), graphs="fixed" if graphs else None
    ).largest
    for rollout_rows, rows, checkpointing in product(written, trained, (False, True)):
        yield Load(
            texts,
            job.prompt,
            job.response,
            rollout_rows,
            rows,
            checkpointing,
            rollout_steps=job.rollout_steps,
            largest=largest,
            graphs=graphs,
        )


def _sizes(most: int) -> list[int]:
    return sorted({min(most, 1 << power) for power in range(_MOST_ROWS.bit_length())})


def _option(student: ModelSize, teacher: ModelSize, load: Load, clock: Clock, split: Split) -> Option:
    given = (load, split, clock.numbers)
    memory = (
        lasting(student, teacher, *given),
        rolling_out(student, teacher, *given),
        with_loss(student, *given),
        backward(student, *given),
    )
    usable = clock.cluster.memory * clock.assumed.memory_usable
    return Option(split, load, memory, clock.step(student, teacher, load, split), needed(*memory) <= usable)
