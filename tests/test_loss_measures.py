"""Sums for the log, against hand-made reports."""

from __future__ import annotations

import torch

from switchkd.data.collate import collate
from switchkd.loss.measures import MEASURE_NAMES, sums_of
from switchkd.loss.objective import Report
from switchkd.records import Example, FinishReason, Prompt, Rollout


def test_tokens_are_summed_in_all_by_writer_and_by_position() -> None:
    nan = (float("nan"),) * 34
    by_teacher = (True, *[False] * 32, True)
    rollout = Rollout(Prompt((1, 2), 0), (5,) * 34, by_teacher, nan, nan, nan, nan, FinishReason.LENGTH)
    example = Example(Prompt((3,), 1), (7, 8))
    batch = collate([rollout, example], pad_id=0)
    divergence = torch.arange(36.0)
    found = {name: (total, count) for name, total, count in sums_of(Report(divergence_N=divergence), batch)}
    assert found == {
        "divergence": (630, 36),
        "divergence/teacher_tokens": (0 + 33, 2),
        "divergence/student_tokens": (sum(range(1, 33)), 32),
        "divergence/data_tokens": (34 + 35, 2),
        "divergence/0-31": (sum(range(32)) + 34 + 35, 34),
        "divergence/32-63": (32 + 33, 2),
        "divergence/64-127": (0, 0),
        "divergence/128-255": (0, 0),
        "divergence/256+": (0, 0),
    }
    assert set(found) <= set(MEASURE_NAMES)


def test_no_counted_token_sums_to_nothing() -> None:
    batch = collate([Example(Prompt((3, 4), 1), ())], pad_id=0)
    assert list(sums_of(Report(), batch)) == []
