"""A study from its file to its tables: what is missing is run, and what is there is shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.text import Text

from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.report.plots import NO_PLOT, save_scores
from switchkd.report.terminal import duration
from switchkd.study.file import StudyConfig
from switchkd.study.plan import StudyRun, plan_of
from switchkd.study.pool import Failure, run_all
from switchkd.study.progress import StudyProgress
from switchkd.study.rows import CSV_FILE, RUNS, Row, finished_rows, kept_models, planned_rows, save_rows
from switchkd.study.summary import MEASURES, Measure, summarize_study
from switchkd.study.tables import grids, report

REPORT_FILE, PLOT_FILE = "study.md", "study.png"


def run_study(study: StudyConfig, console: Console, *, dry_run: bool = False) -> list[Row]:
    """Run what is missing of a study, and write study.csv, study.md, study.png and rows.jsonl into its folder.

    Return the finished rows in the plan's order. `dry_run` says what is to do, and does nothing. Everything is checked before
    the first run. Raises UserError for whatever does not fit, and, at the end, where runs failed; Stopped on Ctrl-C.
    """
    folder = Path(study.output_dir)
    planned = plan_of(study)
    finished = finished_rows(folder)
    missing = [row for row in planned if row.identity not in finished]
    kept = kept_models(folder / RUNS)
    to_train = [row for row in missing if row.kind == "run" and row.training not in kept]
    to_measure = [row for row in missing if row.training in kept]
    _print(
        console,
        _plan_line(study, planned, missing, len(to_train), len(to_measure))
        + _cost_line(study, to_train, finished.values()),
    )
    if dry_run:
        for row in planned:
            how = " (its model is there: only to be measured)" if row in to_measure else ""
            _print(console, f"  {'to do' if row in missing else 'done'}  {row.name}{how}")
        return planned_rows(finished, planned)
    failures: list[Failure] = []
    try:
        if missing:
            failures = _carry_out(study, missing, to_train, console)
    finally:
        rows = planned_rows(_write(study, planned), planned)
    if failures:
        raise UserError(_of_failures(failures, len(planned)))
    return rows


def _carry_out(
    study: StudyConfig, missing: Sequence[StudyRun], to_train: Sequence[StudyRun], console: Console
) -> list[Failure]:
    with StudyProgress(console, len(missing), to_train, study.processes) as progress:
        return run_all(missing, Path(study.output_dir), study.processes, progress, keep_models=study.keep_models)


def _write(study: StudyConfig, planned: Sequence[StudyRun]) -> Mapping[str, Row]:
    """Write all tables from the rows that are there."""
    folder = Path(study.output_dir)
    found = finished_rows(folder)
    rows = planned_rows(found, planned)
    if rows:
        save_rows(folder, found, planned)
        write_atomically(folder / REPORT_FILE, report(study, rows, len(planned) - len(rows)))
        measure = _drawn(rows)
        save_scores(_by_method(study, rows, measure), MEASURES[measure], folder / PLOT_FILE)
    return found


def _drawn(rows: Sequence[Row]) -> Measure:
    """Exact match, or ROUGE-L where answers are free text: less than one in a hundred matches, whoever gives them."""
    found = max(parts["all"]["exact_match"] for row in rows for parts in row["scores"].values())
    return "exact_match" if found >= 1 else "rouge_l"


def _by_method(
    study: StudyConfig, rows: Sequence[Row], measure: Measure
) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """Mean and bounds of a measure by set, method and part, as the plot takes them."""
    return {
        name: {
            line.name: {part: (each.mean, each.low, each.high) for part, each in line.scores.items()}
            for line in summarize_study(rows, name, measure, study.compared_with)
        }
        for name in study.evaluation.sets
    }


def show(study: StudyConfig, rows: Sequence[Row], console: Console) -> None:
    """Print the tables, and where they are kept."""
    from importlib.util import find_spec

    for grid in grids(study, rows) if rows else ():
        console.print(grid.table())
    files = [REPORT_FILE, CSV_FILE, PLOT_FILE] if find_spec("matplotlib") else [REPORT_FILE, CSV_FILE]
    _print(console, f"The tables are in {study.output_dir}: {', '.join(files)}.")
    if len(files) < 3:
        _print(console, NO_PLOT)


def _plan_line(
    study: StudyConfig, planned: Sequence[StudyRun], missing: Sequence[StudyRun], trainings: int, to_measure: int
) -> str:
    there = len(planned) - len(missing)
    kept = ", and of models that are there," if to_measure else ""
    settings = f" x {len(study.settings)} settings" if len(study.settings) > 1 else ""
    return (
        f"{len(study.methods)} methods{settings} x {len(study.seeds)} seeds, {study.budget} each: {trainings} trainings and "
        f"{len(missing) - trainings} evaluations of start and teacher{kept} to do, {there} rows are there; "
        f"{study.processes} at a time, into {study.output_dir}."
    )


def _cost_line(study: StudyConfig, to_train: Sequence[StudyRun], finished: Collection[Row]) -> str:
    """What the trainings will take, as far as the budget or finished rows tell; a method that has none counts as all on average."""
    alike = [row for row in finished if row["kind"] == "run" and row["budget"] == str(study.budget)]
    if not to_train:
        return ""
    if study.budget.seconds is not None:
        total, source = study.budget.seconds * len(to_train), ""
    elif alike:
        total, source = sum(_seconds(row, alike) for row in to_train), ", judging by finished rows"
    else:
        return ""
    return f" Training will take about {duration(total)} of one core{source}; loading and evaluation come on top."


def _seconds(row: StudyRun, finished: Sequence[Row]) -> float:
    """The mean of finished trainings: of the method under its setting, else of the method, else of all."""
    of_method = [each for each in finished if each["method"] == row.method]
    of_setting = [each for each in of_method if each["setting"] == row.setting]
    return fmean(each["costs"]["training_seconds"] for each in of_setting or of_method or finished)


def _of_failures(failures: Sequence[Failure], planned: int) -> str:
    told = "\n".join(f"  {each.row.name}: {each.reason} (all of it: {each.output})" for each in failures)
    return f"{len(failures)} of {planned} runs failed, the others are done; the same command tries these again:\n{told}"


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
