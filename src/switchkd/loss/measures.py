"""Sums of a loss's report for the log: over all counted tokens, by writer, and by position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

import torch

from switchkd.loss.objective import Report
from switchkd.positions import BUCKET_ENDS, BUCKET_NAMES
from switchkd.records import Batch

_MEASURES = tuple(each.name.removesuffix("_N") for each in fields(Report))
_WRITERS = ("student_tokens", "teacher_tokens", "data_tokens")

MEASURE_NAMES = tuple(
    name for measure in _MEASURES for name in (measure, *(f"{measure}/{part}" for part in (*_WRITERS, *BUCKET_NAMES)))
)


def teacher_names(teachers: Iterable[str]) -> list[str]:
    """The names of what is measured for each of several teachers."""
    return [name for teacher in teachers for name in (rows_of(teacher), divergence_from(teacher))]


def rows_of(teacher: str) -> str:
    """The name of the share of a step's rows that are a teacher's."""
    return f"teachers/{teacher}/rows"


def divergence_from(teacher: str) -> str:
    """The name of the divergence at the tokens of a teacher's rows, in nats."""
    return f"teachers/{teacher}/divergence"


def sums_by_teacher(report: Report, batch: Batch) -> Iterator[tuple[str, float, int]]:
    """Name, sum and number of tokens of the divergence for each teacher that the batch names."""
    values = report.divergence_N.cpu().double()
    for teacher in filter(None, dict.fromkeys(batch.teachers)) if values.numel() else ():
        own = values[batch.counted_of(teacher)]
        yield divergence_from(teacher), float(own.sum()), own.numel()


def sums_of(report: Report, batch: Batch) -> Iterator[tuple[str, float, float]]:
    """Name, sum and number of tokens for each measure in the report: in all, by writer, by position bucket.

    Names are those of `MEASURE_NAMES`: "divergence", "divergence/teacher_tokens", "divergence/0-31", ... Units are the report's:
    nats, and 0 or 1 for the agreement. `batch` is the one that the report is about.
    """
    # On the CPU, since not every device has float64.
    counted, by_teacher, rolled_out = (
        mask.cpu() for mask in (batch.response_mask_BT, batch.written_by_teacher_BT, batch.rolled_out_BT)
    )
    position = (counted.cumsum(dim=1) - 1)[counted]
    by_teacher, rolled_out = by_teacher[counted], rolled_out[counted]
    # Neither model wrote the data set's text, whatever written_by_teacher says of it.
    writer = torch.where(rolled_out, by_teacher.long(), 2)
    bucket = torch.bucketize(position, torch.tensor(BUCKET_ENDS), right=True)
    for measure in _MEASURES:
        values = getattr(report, f"{measure}_N").cpu().double()
        if not values.numel():
            continue
        yield measure, float(values.sum()), values.numel()
        for names, index in ((_WRITERS, writer), (BUCKET_NAMES, bucket)):
            totals = torch.bincount(index, values, minlength=len(names)).tolist()
            counts = torch.bincount(index, minlength=len(names)).tolist()
            yield from ((f"{measure}/{name}", t, c) for name, t, c in zip(names, totals, counts, strict=True))
