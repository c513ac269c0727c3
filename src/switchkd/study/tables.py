"""The tables of a study, in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from switchkd.evaluation.intervals import Interval
from switchkd.report.terminal import duration
from switchkd.study.file import StudyConfig
from switchkd.study.rows import Row
from switchkd.study.summary import MEASURES, Line, left_out, measured, summarize_study

_MEANING = """How to read it. A score is the mean over the seeds of training. What stands behind ± is half of its 95 % interval:
over seeds (Student's t) where there are two or more, and over rows (bootstrap) for a single one, for start and for teacher.
A difference is the method's score minus that of *{baseline}*, row by row under the same seed, with the bounds of its 95 %
interval from a bootstrap over rows and seeds. It is bold where 0 lies outside. With few seeds that interval is too narrow
(docs/compare.md)."""


@dataclass(frozen=True)
class Grid:
    """A table of words: a title, headings, and lines; the first column is text, the others are numbers."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown, under a heading."""
        rule = ("---", *["---:"] * (len(self.headings) - 1))
        headings, *lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.headings, *self.lines)]
        rows = [headings, rule, *lines]
        return f"## {self.title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def table(self) -> Table:
        """For the terminal."""
        table = Table(box=box.SIMPLE, title=Text(self.title))
        for number, heading in enumerate(self.headings):
            table.add_column(Text(heading), justify="right" if number else "left", no_wrap=not number)
        for line in self.lines:
            table.add_row(*(Text(cell.replace("**", "")) for cell in line))
        return table


def grids(study: StudyConfig, rows: Sequence[Row]) -> list[Grid]:
    """Scores and differences of each set and measure, then the costs."""
    found = list[Grid]()
    for name in study.evaluation.sets:
        for measure, title in MEASURES.items():
            if not (kept := measured(rows, name, measure)):
                continue
            lines, less = summarize_study(rows, name, measure, study.compared_with), left_out(kept, name)
            # Such as for a prompt that another tokenizer makes too long.
            of_rows = f" (without {less} row(s) that not every model answered)" if less else ""
            found.append(scores_grid(lines, f"{name}: {title}{of_rows}"))
            if any(line.difference for line in lines):
                found.append(_differences_grid(lines, f"{name}: {title}, minus {study.compared_with}{of_rows}"))
    # All that were trained answered.
    trained = summarize_study(rows, study.evaluation.sets[0], "exact_match", study.compared_with)
    return [*found, _costs_grid(trained)] if any(line.costs for line in trained) else found


def scores_grid(lines: Sequence[Line], title: str) -> Grid:
    """A line for each method, a column for each part."""
    parts = [*lines[0].scores]
    cells = [
        (line.name, str(len(line.seeds) or "-"), *(plus_minus(line.scores[part]) for part in parts)) for line in lines
    ]
    return Grid(title, ("method", "seeds", *parts), tuple(cells))


def _differences_grid(lines: Sequence[Line], title: str) -> Grid:
    parts = [*lines[0].scores]
    cells = [(line.name, *(bounds(line.difference[part]) for part in parts)) for line in lines if line.difference]
    return Grid(title, ("method", *parts), tuple(cells))


def _costs_grid(lines: Sequence[Line]) -> Grid:
    trained = [line for line in lines if line.costs]
    cells = []
    for line in trained:
        cost = line.costs
        counts = ("steps", "student_forwards", "teacher_forwards", "generated_tokens")
        told = (*(f"{cost[name]:,.0f}" for name in counts), _teacher_share(cost), duration(cost["training_seconds"]))
        cells.append((line.name, *told))
    counted = ("steps", "student forwards", "teacher forwards", "tokens written")
    headings = ("method", *counted, "by the teacher", "training, one core")
    return Grid("Costs of a run, means over seeds", headings, tuple(cells))


def _teacher_share(cost: Mapping[str, float]) -> str:
    """Such as 20% or 3.1%; of rows of earlier versions, and where nothing was written, it is not known."""
    if not cost["generated_tokens"] or "teacher_generated_tokens" not in cost:
        return ""
    share = cost["teacher_generated_tokens"] / cost["generated_tokens"]
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def plus_minus(interval: Interval) -> str:
    """Such as 58.0 ± 1.2."""
    return f"{interval.mean:.1f} ± {interval.half:.1f}" if interval.known else f"{interval.mean:.1f}"


def bounds(interval: Interval) -> str:
    """Such as +10.2 (+7.1 to +13.0), bold where 0 is outside."""
    text = f"{interval.mean:+.1f}"
    text += f" ({interval.low:+.1f} to {interval.high:+.1f})" if interval.known else ""
    return f"**{text}**" if interval.excludes_zero else text


def report(study: StudyConfig, rows: Sequence[Row], missing: int) -> str:
    """study.md: what was compared, the tables, and how to read them."""
    evaluation = study.evaluation
    how = (
        "greedy answers"
        if evaluation.temperature == 0
        else f"answers sampled at temperature {evaluation.temperature:g}"
    )
    limit = f", the first {evaluation.limit:,} rows of each" if evaluation.limit else ""
    still = f" **{missing} of its runs are still to be done.**" if missing else ""
    intro = (
        f"# {study.output_dir.rstrip('/').rpartition('/')[2]}\n\n"
        f"{len(study.methods)} methods, seeds {', '.join(map(str, study.seeds))}, {study.budget} each; "
        f"{how} to {', '.join(evaluation.sets)}{limit}.{still}\n"
    )
    parts = [grid.markdown() for grid in grids(study, rows)] if rows else []
    return "\n".join([intro, *parts, _MEANING.format(baseline=study.compared_with) + "\n"])
