"""How long the next block should be, from what has stood of each row's drafts and from what forwards of both models cost.

No clock is asked: equal texts are written in equal blocks, so equal runs stay equal bit for bit. What a forward costs is estimated:
each layer has to be started, each weight read, and each position multiplied with all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.models.heads import base_of
from switchkd.models.pair import ModelPair, parameter_count

_LARGEST = 16
# Where each size costs a graph.
_FEW = (2, 4, 8)
# The weight of the old beside a new block: about five blocks count, soon enough after a change.
_MEMORY = 0.8
# Before anything is known nine of ten proposals are taken to stand.
_STOOD_BEFORE, _FELL_BEFORE = 9.0, 1.0
# A row starts from the average of all rows, which counts as this many tokens of its own.
_LIKE_ALL = 2.0


@dataclass(frozen=True)
class _Machine:
    """Costs in multiplications of a weight: of starting a layer (eager, in a graph), reading a weight, and handling a block."""

    eager_layer: float
    graph_layer: float
    weight: float
    block: float


# Fitted to a CPU core that multiplies 50 billion weights a second: 1.2 and 0.4 ms a layer, 10 GB/s, 4 ms a block.
_CPU = _Machine(60e6, 20e6, 20.0, 200e6)
# A large GPU's 500 TFLOP/s, 3 TB/s in 16 bits, 0.1 ms a layer, 2 ms a block: not measured.
_GPU = _Machine(2.5e10, 0.0, 170.0, 5e11)


def check_block_size(block_size: int | str | None) -> None:
    """Raise UserError unless it is a number of tokens, or "auto", as None is."""
    if block_size not in (None, "auto") and (not isinstance(block_size, int) or block_size < 1):
        raise UserError(f"block_size is {block_size!r}; give 1 or more tokens, or auto")


@dataclass(frozen=True)
class ForwardCost:
    """The cost of a forward, in multiplications of a weight: a fixed part, and a part for each position that it reads."""

    fixed: float = 0.0
    each_position: float = 0.0

    def of(self, positions: int) -> float:
        """The cost of one forward. `positions` counts those of all rows."""
        return self.fixed + self.each_position * positions


@dataclass(frozen=True)
class BlockCost:
    """The cost of a block: the student's steps, the teacher's forward if it reads the block, and the work outside both models."""

    student: ForwardCost
    teacher: ForwardCost = ForwardCost()
    beside: float = 0.0

    def of(self, size: int, rows: int) -> float:
        """The cost of one block, `size` tokens long, for `rows` rows."""
        return size * self.student.of(rows) + self.teacher.of(size * rows) + self.beside


def block_cost(pair: ModelPair, *, reads_teacher: bool, graphs: bool) -> BlockCost:
    """The cost of this pair's blocks, estimated from the models' sizes and the student's device."""
    machine = _CPU if pair.student.device.type == "cpu" else _GPU
    layer = machine.graph_layer if graphs else machine.eager_layer

    def cost(model: PreTrainedModel) -> ForwardCost:
        # A student without its adapter owns no weights.
        parameters = parameter_count(model) or parameter_count(pair.student)
        layers = getattr(base_of(model).config.get_text_config(), "num_hidden_layers", 1)
        return ForwardCost(layer * layers + machine.weight * parameters, parameters)

    teacher = cost(pair.teacher) if pair.teacher is not None and reads_teacher else ForwardCost()
    return BlockCost(cost(pair.student), teacher, machine.block)


class Drafts:
    """How many of a row's recent proposals stood and fell. Older blocks count less."""

    def __init__(self) -> None:
        self.stood = 0.0
        self.fell = 0.0

    def learn(self, stood: int, fell: bool) -> None:
        """Count a block: `stood` proposals were kept, and `fell` says whether the next one was rejected or ended the text."""
        self.stood = _MEMORY * self.stood + stood
        self.fell = _MEMORY * self.fell + fell


class BlockChooser:
    """Chooses block sizes: a fixed one, or for "auto" the one that should finish the call first.

    With acceptance a (the share of proposals that stand, given that all before them did), a block of k keeps
    1 + a + ... + a^(k-1) tokens of a row, and costs what `cost` says. While prompts wait, the best size keeps the most tokens for
    its cost. Once none waits, the slowest row decides. Otherwise a row on which the models never agree would hold up the call with
    drafts that never stand.

    `graphs` are those of the draft loop. Each size costs a graph of fixed shapes, so there are few sizes. Open graphs serve all
    sizes but 1, for which torch makes another. A block exceeds what is left to write only where no smaller size is allowed.
    """

    def __init__(
        self,
        block_size: int | str | None,
        max_new_tokens: int,
        *,
        cost: BlockCost,
        graphs: Literal["fixed", "open"] | None = None,
    ) -> None:
        self.fixed = isinstance(block_size, int)
        largest = block_size if isinstance(block_size, int) else _LARGEST
        every = range(1 if graphs is None else min(2, largest), largest + 1)
        few = (largest,) if self.fixed else _FEW
        self.sizes: Sequence[int] = few if graphs == "fixed" else every
        self.cost = cost
        self.largest = self._allowed(max_new_tokens)[-1]
        self._all = Drafts()

    def learn(self, drafts: Drafts, stood: int, fell: bool) -> None:
        """Count a row's block, for the row and for all rows; see `Drafts.learn`."""
        drafts.learn(stood, fell)
        self._all.stood += stood
        self._all.fell += fell

    def choose(self, rows: Sequence[tuple[Drafts, int]], *, waiting: bool) -> int:
        """The size of the next block, in tokens. Each row brings its drafts and the number of tokens it may still write.

        `waiting` says whether prompts wait for a free row.
        """
        sizes = self._allowed(min(self.largest, max(room for _, room in rows)))
        if self.fixed:
            return sizes[-1]
        stood, fell = self._all.stood + _STOOD_BEFORE, self._all.fell + _FELL_BEFORE
        like_all = _LIKE_ALL * stood / (stood + fell)
        each = [((drafts.stood + like_all) / (drafts.stood + drafts.fell + _LIKE_ALL), room) for drafts, room in rows]
        return max(sizes, key=lambda size: self._worth(size, each, waiting=waiting))

    def _allowed(self, room: int) -> Sequence[int]:
        return [size for size in self.sizes if size <= room] or self.sizes[:1]

    def _worth(self, size: int, rows: Sequence[tuple[float, int]], *, waiting: bool) -> float:
        kept = [(1 - acceptance ** min(size, room)) / (1 - acceptance) for acceptance, room in rows]
        cost = self.cost.of(size, len(rows))
        if waiting:
            return sum(kept) / cost
        return 1 / (cost * max(room / tokens for tokens, (_, room) in zip(kept, rows, strict=True)))
