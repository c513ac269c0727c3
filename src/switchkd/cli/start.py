"""The commands of the first hour: write a run file, and look up recipes, settings and methods."""

from __future__ import annotations

from typing import Annotated

import typer

from switchkd.cli.help import option
from switchkd.cli.options import new_console

Markdown = Annotated[bool, option(None, "", "Print all of them as a page of docs/ has it.", "--markdown")]


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
    """List the run files that come with switchkd, or print one: `switchkd train recipe:NAME` runs it."""
    from rich.table import Table
    from rich.text import Text

    from switchkd.run import recipes as kept

    if name is not None:
        typer.echo(kept.recipe_file(name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for each, path in kept.recipes().items():
        table.add_row(Text(each, style="bold"), Text(kept.title(path)))
    new_console().print(table)
