"""The commands of the first hour: write a run file, and look up recipes, settings and methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from switchkd.cli.help import option
from switchkd.cli.options import Device, new_console, quiet_transformers
from switchkd.errors import UserError

Markdown = Annotated[bool, option(None, "", "Print all of them as a page of docs/ has it.", "--markdown")]


def init(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Hub id, folder, .gguf file or world:student.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="As STUDENT, with the same vocabulary.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, a set's name or a hub name, NAME:SPLIT.")],
    output: Annotated[Path, option(None, "FILE", "The run file to write.", "--output", "-o")] = Path("run.yaml"),
    force: Annotated[bool, option(None, "", "Replace a file that is there.", "--force")] = False,
    device: Device = "auto",
) -> None:
    """Write a run file whose values fit the pair, the data and the free memory.

    Vocabularies and chat templates are compared, and columns are found; no weight is read.
    """
    from switchkd.files import write_atomically
    from switchkd.models.placement import placement_of
    from switchkd.run.draft import draft_run

    quiet_transformers()
    if output.exists() and not force:
        raise UserError(f"{output} is there already; give another -o, or --force to replace it")
    text = draft_run(student, teacher, data, placement_of(device=device))
    try:
        write_atomically(output, text)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    console = new_console()
    console.print(Text(text), soft_wrap=True)
    console.print(Text(f"This is in {output}; next: switchkd train {output}"), soft_wrap=True)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one in full.")] = None,
    markdown: Markdown = False,
) -> None:
    """List the methods, or show one: its settings, its source and where it departs from it."""
    from switchkd.methods.table import METHOD, METHODS
    from switchkd.report.methods_page import method_details, methods_page, methods_table

    if markdown:
        typer.echo(methods_page(METHODS), nl=False)
    else:
        new_console().print(methods_table(METHODS) if name is None else method_details(name, METHOD.find(name)))


def settings(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one in full, such as policy or policy.keep_top_k.")
    ] = None,
    markdown: Markdown = False,
) -> None:
    """List the settings of a run file, or show one: its type, its default and what it does."""
    from switchkd.report.settings_page import setting_details, settings_page, settings_tables
    from switchkd.run.file import HINTS, OUR_FIELDS, TRAINING_FIELDS

    if markdown:
        typer.echo(settings_page(OUR_FIELDS, HINTS), nl=False)
    elif name is None:
        new_console().print(settings_tables(OUR_FIELDS, HINTS))
    else:
        new_console().print(setting_details(name, OUR_FIELDS, HINTS, TRAINING_FIELDS))


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one's file.")] = None,
) -> None:
    """List the run files that come with switchkd, or print one: `switchkd train recipe:NAME` runs it.

    Those under accelerate/ are files for `accelerate launch --config_file`.
    """
    from rich.table import Table

    from switchkd.run import recipes as kept

    if name is not None:
        typer.echo(kept.shown_file(name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for each, path in (kept.recipes() | kept.launch_files()).items():
        table.add_row(Text(each, style="bold"), Text(kept.title(path)))
    new_console().print(table)
