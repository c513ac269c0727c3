"""The block chooser: near the best size by measured costs, and always within the room."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchkd.rollout.blocks import BlockChooser


@dataclass(frozen=True)
class World:
    """Rows whose proposals stand with probability `acceptance`, and a machine with these costs in seconds."""

    acceptance: float
    draft: float = 1.0
    base: float = 8.0
    slope: float = 0.1
    rows: int = 16

    def verify(self, size: int) -> float:
        return self.base + self.slope * size

    def kept_per_second(self, size: int) -> float:
        kept = sum(self.acceptance**position for position in range(size))
        return kept / (size * self.draft + self.verify(size))

    def run(self, chooser: BlockChooser, blocks: int, rng: Random, room: int = 256) -> list[int]:
        """The sizes that the chooser takes, with each block's cost reported to it."""
        sizes = []
        for _ in range(blocks):
            size = chooser.choose(room)
            lengths = [self._stands(size, rng) for _ in range(self.rows)]
            stopped = sum(length < size for length in lengths)
            chooser.learn(size, self.rows, sum(lengths), stopped, size * self.draft, self.verify(size))
            sizes.append(size)
        return sizes

    def _stands(self, size: int, rng: Random) -> int:
        length = 1
        while length < size and rng.random() < self.acceptance:
            length += 1
        return length


@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize(("base", "slope"), [(2.0, 0.0), (8.0, 0.1), (8.0, 2.0), (20.0, 0.5)])
def test_finds_a_size_near_the_best(acceptance: float, base: float, slope: float) -> None:
    world = World(acceptance, base=base, slope=slope)
    best = max(world.kept_per_second(size) for size in range(1, 17))
    sizes = world.run(BlockChooser("auto", 256), 60, Random(0))
    reached = [world.kept_per_second(size) for size in sizes[-30:]]
    # It takes blocks of at least two and measures acceptance on about 80 rows, hence within a tenth of the best.
    floor = min(best, max(world.kept_per_second(size) for size in range(2, 17)))
    assert sum(reached) / len(reached) > 0.9 * floor


def test_follows_a_change() -> None:
    chooser, rng = BlockChooser("auto", 256), Random(1)
    low = World(0.3, base=8).run(chooser, 40, rng)[-10:]
    high = World(0.97, base=8).run(chooser, 40, rng)[-10:]
    again = World(0.3, base=8).run(chooser, 40, rng)[-10:]
    assert max(low) < min(high)
    assert max(again) < min(high)


def test_an_expensive_teacher_runs_less_often_than_a_cheap_one() -> None:
    cheap, expensive = (World(0.8, base=base).run(BlockChooser("auto", 256), 40, Random(2))[-1] for base in (1.0, 40.0))
    assert cheap < expensive


@pytest.mark.parametrize("fixed", [1, 4, 16, 40])
def test_a_fixed_size_is_kept_whatever_is_measured(fixed: int) -> None:
    chooser = BlockChooser(fixed, 256)
    assert set(World(0.1).run(chooser, 10, Random(0))) == {fixed}
    assert chooser.choose(3) == min(fixed, 3)
    assert BlockChooser(fixed, 5).largest == min(fixed, 5)


measured = st.tuples(st.integers(1, 64), st.floats(0, 1), st.floats(0, 10), st.floats(0, 10))


@given(st.lists(st.tuples(st.integers(1, 300), measured), max_size=30), st.integers(1, 300))
def test_never_more_than_the_room_and_never_less_than_one(
    blocks: list[tuple[int, tuple[int, float, float, float]]], limit: int
) -> None:
    chooser = BlockChooser("auto", limit)
    assert chooser.largest <= limit
    for room, (rows, share, draft, verify) in blocks:
        size = chooser.choose(room)
        assert 1 <= size <= min(room, chooser.largest)
        written = rows + round(share * rows * (size - 1))
        chooser.learn(size, rows, written, min(rows, rows * size - written), draft, verify)
