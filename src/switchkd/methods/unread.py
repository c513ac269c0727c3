"""Settings that nothing would read: refused and not ignored, or a run is not what its author thinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from switchkd.errors import UserError
from switchkd.methods.parts import OF_ROLLOUTS
from switchkd.methods.plan import writers_of
from switchkd.methods.table import Method


def check_read(given: Mapping[str, Any], row: Method, method: Method, *, name: str, reads_teacher_text: bool) -> None:
    """Raise UserError for a setting that a run gives and nothing would read.

    `row` is its method as it stands in the table, under `name`, and `method` the same with what is given filled in.
    """
    for key, reason in _unread(given, row, method, name, reads_teacher_text):
        if given[key]:
            raise UserError(f"{key} is {given[key]}, but {reason}")
    if given["student_share"] is not None and not (row.student_share or row.share_rise):
        raise UserError(f"student_share is {given['student_share']}, but method {name!r} trains on data only; use gkd")
    if given["replay_share"] is not None and not method.replay_capacity:
        raise UserError(
            f"replay_share is {given['replay_share']}, but replay_capacity is 0; set it, or leave the share out"
        )


def _unread(
    given: Mapping[str, Any], row: Method, method: Method, name: str, reads_teacher_text: bool
) -> Iterator[tuple[str, str]]:
    """The settings that nothing reads here, each with the reason and what to do."""
    if not reads_teacher_text:
        yield "teacher_text", f"method {name!r} does not read it; leave it out"
    if method.divergence is None:
        for key in ("teacher_text_divergence", "target", "start_weight"):
            yield key, f"method {name!r} has no divergence; set one, or leave it out"
    if not (method.student_share or method.share_rise):
        for key in OF_ROLLOUTS:
            yield key, f"method {name!r} has no rollouts here; leave it out"
    if "teacher" not in writers_of(method.policy, method.teacher_text_share):
        yield "teacher_text_divergence", "no token of the rollouts is the teacher's; leave it out"
    if not method.start_weight:
        yield "start_divergence", "start_weight is 0; set it, or leave the divergence out"
