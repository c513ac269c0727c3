"""Means over steps and processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchkd.training.meters import Meters


def alone(sums: Tensor) -> Tensor:
    return sums


def test_a_mean_is_over_all_items_and_not_over_the_calls() -> None:
    meters = Meters(["loss"])
    meters.add("loss", 6.0, 1)
    meters.add("loss", torch.tensor(2.0), torch.tensor(3))
    assert meters.drain(alone) == {"loss": 2.0}


def test_what_was_not_seen_is_left_out_and_a_zero_is_not() -> None:
    meters = Meters(["seen", "zero", "unseen"])
    meters.add("seen", 3, 2)
    meters.add("zero", 0, 2)
    meters.add("unseen", 0, 0)
    assert meters.drain(alone) == {"seen": 1.5, "zero": 0.0}


def test_draining_starts_from_nothing() -> None:
    meters = Meters(["loss"])
    meters.add("loss", 6, 1)
    meters.drain(alone)
    assert meters.drain(alone) == {}
    meters.add("loss", 2, 1)
    assert meters.drain(alone) == {"loss": 2.0}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="speed"):
        Meters(["loss"]).add("speed", 1, 1)


def test_not_a_number_stays_in_its_own_mean() -> None:
    meters = Meters(["bad", "good"])
    meters.add("bad", math.nan, 1)
    meters.add("good", 1, 1)
    drained = meters.drain(alone)
    assert math.isnan(drained["bad"])
    assert drained["good"] == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1000, 1000), st.integers(1, 50)), max_size=30))
def test_processes_together_are_one_process_with_all_of_it(added: list[tuple[int, int, int]]) -> None:
    """Each triple is a process, a sum and a count; whole numbers, so sums in any order are exact."""
    one, several = Meters(["loss", "idle"]), [Meters(["loss", "idle"]) for _ in range(3)]
    for process, total, count in added:
        one.add("loss", total, count)
        several[process].add("loss", total, count)
    shares: list[Tensor] = []

    def give(sums: Tensor) -> Tensor:
        shares.append(sums.clone())
        return sums

    for meters in several[1:]:
        meters.drain(give)
    together = several[0].drain(lambda sums: torch.cat([sums, *shares]))
    assert together == one.drain(alone)
