"""The progress bar: where it is shown, and what it counts."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from switchkd.progress import progress_bar


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shown", [True, False, None])
def test_it_is_shown_on_a_terminal_unless_told_otherwise(terminal: bool, shown: bool | None) -> None:
    # 80 columns: neither the count nor the times may be cut off.
    output = io.StringIO()
    with progress_bar(Console(file=output, force_terminal=terminal, width=80), shown) as progress:
        progress.update(progress.add_task("the teacher writes", total=10_000), completed=1234)
        progress.note = "loss 0.5"
    if terminal if shown is None else shown:
        for part in ("the teacher writes", "1234/10000", "0:00:00", "left", "-:--:--", "loss 0.5"):
            assert part in output.getvalue()
    else:
        assert not output.getvalue().strip()


def test_a_part_is_counted_from_where_the_task_stands() -> None:
    with progress_bar(shown=False) as progress:
        task = progress.add_task("answers", total=6)
        for sizes in ((1, 2), (1, 3, 4)):
            count = progress.counter(task)
            for finished in sizes:
                count(finished)
    assert progress.tasks[task].completed == 6
