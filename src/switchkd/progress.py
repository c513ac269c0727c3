"""The one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import rich.progress
from rich.console import Console, RenderableType
from rich.text import Text


class ProgressBar(rich.progress.Progress):
    """A bar with a `note` in a line below it, unless the note is empty."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then the note."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)

    def counter(self, task: rich.progress.TaskID) -> Callable[[int], None]:
        """A function to tell how much of a part is finished, for a part that starts where the task stands now."""
        before = self.tasks[task].completed
        return lambda finished: self.update(task, completed=before + finished)


def progress_bar(console: Console | None = None, shown: bool | None = None) -> ProgressBar:
    """A bar for use in `with`, whose tasks the caller adds: description, bar, M of N, time elapsed and time left.

    `console` is rich's own by default. Unless `shown` says otherwise, the bar is silent where the console is no terminal.
    """
    console = console or rich.get_console()
    columns = (
        rich.progress.TextColumn("{task.description}"),
        # The bar takes the width that the others leave, so that the times are not cut off on a narrow terminal.
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
    )
    return ProgressBar(*columns, console=console, disable=not (console.is_terminal if shown is None else shown))
