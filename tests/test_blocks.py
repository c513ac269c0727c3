"""The block chooser: near the best size for what stands and what a block costs, led by the slowest row, within the room."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchkd.rollout.blocks import BlockChooser, BlockCost, Drafts, ForwardCost, block_cost
from tiny import tiny_pair

ROOM = 256


def cost_of(verification: float) -> BlockCost:
    """Blocks whose drafts cost 1 each, and whose verification costs this."""
    return BlockCost(ForwardCost(1.0), ForwardCost(verification))


@dataclass
class World:
    """Rows whose proposals stand with these probabilities, and what a block costs beside its drafts, in drafts."""

    acceptances: list[float]
    verification: float = 8.0
    rows: list[Drafts] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [Drafts() for _ in self.acceptances]

    def chooser(self) -> BlockChooser:
        """An "auto" one that knows the cost."""
        return BlockChooser("auto", ROOM, cost=cost_of(self.verification))

    def run(self, chooser: BlockChooser, blocks: int, rng: Random, *, waiting: bool = True) -> list[int]:
        """The sizes that the chooser takes, told what became of each."""
        sizes = []
        for _ in range(blocks):
            sizes.append(size := chooser.choose([(row, ROOM) for row in self.rows], waiting=waiting))
            for row, acceptance in zip(self.rows, self.acceptances, strict=True):
                stood = 0
                while stood < size and rng.random() < acceptance:
                    stood += 1
                chooser.learn(row, stood, stood < size)
        return sizes


@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("verification", [0.5, 2.0, 8.0, 20.0])
def test_finds_a_size_near_the_best(acceptance: float, verification: float) -> None:
    def worth(size: int) -> float:
        return sum(acceptance**position for position in range(size)) / (size + verification)

    world = World([acceptance] * 16, verification)
    sizes = world.run(world.chooser(), 60, Random(0))
    # Acceptance is measured on about 80 rows' blocks, hence within a tenth of the best.
    assert sum(map(worth, sizes[-30:])) / 30 > 0.9 * max(map(worth, range(1, 17)))


def test_the_row_that_is_furthest_from_its_end_decides_once_no_prompt_waits() -> None:
    acceptances = [0.97] * 7 + [0.05]
    many, last = World(acceptances), World(acceptances)
    waiting = many.run(many.chooser(), 40, Random(1))[-10:]
    none_waits = last.run(last.chooser(), 40, Random(1), waiting=False)[-10:]
    # On its own the slow row wants single tokens, the others the largest blocks.
    assert max(none_waits) <= 2 < min(waiting)


def test_a_row_that_is_nearly_done_holds_nobody_up() -> None:
    chooser, slow, fast = BlockChooser("auto", ROOM, cost=cost_of(8.0)), Drafts(), Drafts()
    for _ in range(20):
        chooser.learn(slow, 0, True)
        chooser.learn(fast, 12, False)
    assert chooser.choose([(slow, 200), (fast, 200)], waiting=False) < chooser.choose(
        [(slow, 1), (fast, 200)], waiting=False
    )


def test_follows_a_change() -> None:
    low, high = World([0.3] * 16), World([0.97] * 16)
    chooser, rng = low.chooser(), Random(1)
    high.rows = low.rows
    first = low.run(chooser, 40, rng)[-10:]
    then = high.run(chooser, 40, rng)[-10:]
    again = low.run(chooser, 40, rng)[-10:]
    assert max(first) < min(then)
    assert max(again) < min(then)


def test_a_large_teacher_runs_less_often_than_a_small_one() -> None:
    small, large = (World([0.8] * 16, cost) for cost in (1.0, 40.0))
    assert small.run(small.chooser(), 40, Random(2))[-1] < large.run(large.chooser(), 40, Random(2))[-1]


def test_what_a_block_costs_follows_from_sizes_rows_and_device() -> None:
    pair = tiny_pair("llama")
    assert pair.teacher is not None
    cost = block_cost(pair, reads_teacher=True, graphs=False)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (pair.student, pair.teacher)]
    assert [cost.student.each_position, cost.teacher.each_position] == sizes
    alone = block_cost(pair, reads_teacher=False, graphs=False)
    assert alone.student == cost.student
    assert alone.of(4, 8) < cost.of(4, 8)
    # The teacher reads all positions of all rows at once, the student those of all rows in each of its steps.
    more = cost.of(4, 16) - cost.of(4, 8)
    assert more == pytest.approx(4 * 8 * (cost.student.each_position + cost.teacher.each_position))
    # Twice the rows cost more, but not twice: layers are started and weights read once.
    assert cost.of(4, 8) < cost.of(4, 16) < 2 * cost.of(4, 8)
    assert block_cost(pair, reads_teacher=True, graphs=True).of(4, 8) < cost.of(4, 8)


def test_with_many_rows_a_draft_that_falls_costs_the_teacher_more() -> None:
    # 5M and 40M parameters in 4 and 8 layers, on a CPU.
    cost = BlockCost(ForwardCost(340e6, 5e6), ForwardCost(1280e6, 40e6), beside=200e6)
    few, many = (World([0.75] * rows) for rows in (8, 64))
    sizes = [world.run(BlockChooser("auto", ROOM, cost=cost), 40, Random(3))[-10:] for world in (few, many)]
    assert max(sizes[1]) < min(sizes[0])


@pytest.mark.parametrize("fixed", [1, 4, 16, 40])
def test_a_fixed_size_is_kept_whatever_stands(fixed: int) -> None:
    chooser, world = BlockChooser(fixed, ROOM, cost=cost_of(8.0)), World([0.1] * 4)
    assert set(world.run(chooser, 10, Random(0))) == {fixed}
    assert chooser.choose([(Drafts(), 3), (Drafts(), 2)], waiting=False) == min(fixed, 3)
    assert BlockChooser(fixed, 5, cost=cost_of(8.0)).largest == min(fixed, 5)


seen = st.tuples(st.integers(1, 300), st.integers(0, 16), st.booleans())


@given(
    st.lists(st.lists(seen, min_size=1, max_size=5), max_size=20),
    st.integers(1, 300),
    st.floats(0.5, 100),
    st.sampled_from(["fixed", "open", None]),
    st.booleans(),
)
def test_never_more_than_the_room_and_never_less_than_one(
    blocks: list[list[tuple[int, int, bool]]],
    limit: int,
    verification: float,
    graphs: Literal["fixed", "open"] | None,
    waiting: bool,
) -> None:
    chooser = BlockChooser("auto", limit, cost=cost_of(verification), graphs=graphs)
    # No graph is made for a single token.
    least = 1 if graphs is None else 2
    assert chooser.largest <= max(least, limit)
    for block in blocks:
        rows = [(Drafts(), room) for room, _, _ in block]
        size = chooser.choose(rows, waiting=waiting)
        room = max(room for _, room in rows)
        assert least <= size <= max(least, min(room, chooser.largest))
        assert graphs != "fixed" or size in {2, 4, 8}
        for (drafts, _), (_, stood, fell) in zip(rows, block, strict=True):
            chooser.learn(drafts, stood, fell)


def test_equal_texts_are_written_in_equal_blocks() -> None:
    first, second = World([0.8] * 4), World([0.8] * 4)
    assert first.run(first.chooser(), 30, Random(5)) == second.run(second.chooser(), 30, Random(5))
