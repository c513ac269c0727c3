"""How long a step takes, by a model of cost whose every assumption is a number here: work / (peak x the share that is reached).

A forward of few tokens is bound by reading the weights, one of many by its products, and a small model's by the launch of its
kernels; each forward takes the longest of the three. Communication is added, as if none of it were hidden behind the products.
"""

from __future__ import annotations

from dataclasses import dataclass

from switchkd.scale.memory import Bytes, Load, Split
from switchkd.scale.sizes import ModelSize

GIB = 2**30
# GB a second that a device sends while it receives as much: NVLink 4 of an H100, and PCI Express 5 with 16 lanes.
LINKS = {"nvlink": 450.0, "pcie": 60.0}


@dataclass(frozen=True)
class Cluster:
    """`gpus` devices of `memory` bytes, a link of `link` GB/s a device. Peaks are an H100 SXM's: dense bf16, and HBM3."""

    gpus: int = 8
    memory: int = 80 * GIB
    link: float = LINKS["nvlink"]
    tera_flops: float = 989.0
    bandwidth: float = 3350.0
    host_link: float = 60.0


@dataclass(frozen=True)
class Assumptions:
    """What no specification says. None of it was measured on a GPU by us; see docs/scale.md."""

    compute_reached: float = 0.4
    bandwidth_reached: float = 0.6
    link_reached: float = 0.7
    # Seconds that the kernels of a layer take to launch one by one, and as part of a graph.
    launch: float = 0.9e-3
    launch_in_graph: float = 0.1e-3
    # Of a block of four drafted tokens.
    kept_of_block: float = 2.6
    # Of a device's memory, for the driver and the allocator's gaps.
    memory_usable: float = 0.92


@dataclass(frozen=True)
class Clock:
    """The seconds of the parts of a step on one process."""

    cluster: Cluster
    numbers: Bytes
    assumed: Assumptions = Assumptions()

    def step(self, student: ModelSize, teacher: ModelSize, load: Load, split: Split) -> dict[str, float]:
        """Seconds by part: what the student and the teacher do in rollouts, training, the optimizer, and what is sent."""
        # One call writes the text of several steps; this is a step's part of it.
        calls = 1 / load.rollout_steps
        waves = -(-load.written_at_once // load.rollout_rows) * calls
        rows = min(load.rollout_rows, load.written_at_once)
        blocks = waves * load.response / self.assumed.kept_of_block
        in_graph = load.graphs and split.teacher != "device_map"
        read = load.texts * load.prompt
        drafting = blocks * load.block * self._decoding(student, load, rows, rows, in_graph)
        checking = blocks * self._decoding(teacher, load, rows, rows * load.block, in_graph)
        seconds = {
            "student writes": drafting + self._products(2 * student.multiplied_a_token * read),
            "teacher reads": checking + self._products(2 * teacher.multiplied_a_token * read),
            "training": self._training(student, load),
            # Weights and gradients once, both moments there and back; but for DDP, each process has a part of them.
            "optimizer": 28
            * student.trained
            / (1 if split.spread == "ddp" else split.processes)
            / (self.cluster.bandwidth * 1e9 * self.assumed.bandwidth_reached),
            "gradients sent": self._sent(self._gradient_bytes(student, load, split)),
        }
        if split.spread == "fsdp2":
            seconds["student gathered"] = calls * self._sent(
                _received(student.parameters * self.numbers.student, split.processes)
            )
        if split.teacher == "shared":
            part = _received(teacher.layers * teacher.layer * self.numbers.teacher, split.processes)
            seconds["teacher gathered"] = (blocks + waves) * self._sent(part)
        if split.teacher == "cpu":
            loaded = (teacher.parameters - teacher.head) * self.numbers.teacher
            seconds["teacher loaded"] = calls * loaded / (self.cluster.host_link * 1e9 * self.assumed.link_reached)
        return seconds

    def _decoding(self, model: ModelSize, load: Load, rows: int, tokens: int, in_graph: bool) -> float:
        """A forward of `tokens` new ones, with caches half full."""
        cached = model.cached(rows, load.prompt + load.response // 2)
        read = (model.multiplied + cached) * self.numbers.computing
        reading = read / (self.cluster.bandwidth * 1e9 * self.assumed.bandwidth_reached)
        launched = model.layers * (self.assumed.launch_in_graph if in_graph else self.assumed.launch)
        return max(reading, self._products(2 * model.multiplied_a_token * tokens), launched)

    def _products(self, operations: float) -> float:
        return operations / (self.cluster.tera_flops * 1e12 * self.assumed.compute_reached)

    def _training(self, student: ModelSize, load: Load) -> float:
        # Backward is twice a forward, and checkpointing one forward more.
        forwards = 4 if load.checkpointing else 3
        length = load.prompt + load.response
        attention = 2 * length * length * student.heads * student.head_size * student.layers
        operations = forwards * load.texts * (2 * student.multiplied_a_token * length + attention)
        batches = -(-load.texts // load.rows)
        return max(self._products(operations), batches * forwards * student.layers * self.assumed.launch)

    def _gradient_bytes(self, student: ModelSize, load: Load, split: Split) -> float:
        """What a process receives for a step's gradients, and with FSDP2 for the weights of its forwards and backwards."""
        gradients = _received(student.trained * self.numbers.student, split.processes)
        if split.spread != "fsdp2":
            # Summed, and handed round: by an all-reduce, or with ZeRO the weights in its second half.
            return 2 * gradients
        batches = -(-load.texts // load.rows)
        weights = _received(student.parameters * self.numbers.computing, split.processes)
        return batches * (2 * weights + gradients)

    def _sent(self, size: float) -> float:
        return size / (self.cluster.link * 1e9 * self.assumed.link_reached)


def _received(size: int, processes: int) -> float:
    """Of `size` bytes that lie in equal parts on the processes, what each of them lacks."""
    return size * (processes - 1) / processes
