"""The command that runs a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from switchkd.cli.help import option
from switchkd.cli.options import new_console, quiet_transformers


def compare(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Methods, seeds, budget and evaluation.")],
    workers: Annotated[int | None, option(None, "N", "Runs at a time, one thread each.", min=1)] = None,
    output: Annotated[Path | None, option(None, "FOLDER", "The study's folder, in place of output_dir.")] = None,
    dry_run: Annotated[bool, option(None, "", "Say what is to do and what is there, and stop.", "--dry-run")] = False,
) -> None:
    """Compare methods over seeds on equal budgets: run what is missing, then tables with intervals.

    What is done is never run again, and a study that was stopped goes on.
    """
    from switchkd.study.file import read_study
    from switchkd.study.launch import run_study, show

    quiet_transformers()
    study = read_study(study_file)
    study = replace(study, workers=workers or study.workers, output_dir=str(output or study.output_dir))
    console = new_console()
    rows = run_study(study, console, dry_run=dry_run)
    if not dry_run:
        show(study, rows, console)
