"""How help pages look: options in panels, each with what it takes, an example at the end, and the new names of old options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from switchkd.errors import UserError, did_you_mean
from switchkd.settings.unknown import foreign_named

MODELS, PROMPTS, POLICY, SAMPLING, OUTPUT, DEVICE = (
    "Models",
    "Prompts",
    "Policy",
    "Sampling",
    "Output",
    "Device and precision",
)
_HELP = "Help"
# An option is called as its key in a run file.
RENAMED = {"--share": "--teacher-share", "--batch-size": "--rollout-rows", "--teacher-top-k": "--keep-top-k"}


def option(panel: str | None, takes: str, sentence: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help page, with a word for what it takes; "" for a flag, which takes nothing."""
    return typer.Option(*names, metavar=takes, help=sentence, rich_help_panel=panel, **more)


def example(arguments: str) -> str:
    """The end of a help page: one call of the command."""
    return f"[bold]Example[/bold]   switchkd {arguments}"


def _without_python_types(params: list[Any]) -> list[Any]:
    """The parameters as the help page shows them; --help has a panel of its own where the others have theirs."""
    in_panels = any(getattr(each, "rich_help_panel", None) for each in params)
    for each in params:
        if getattr(each, "is_flag", False):
            # typer writes <bool> beside what takes no value.
            each.metavar = ""
        if each.param_type_name == "argument":
            # Nor would <path> beside RUN.yaml tell a reader anything.
            each.display_type_rich = lambda ctx: None
        if each.name == "help" and in_panels:
            each.rich_help_panel = _HELP
    return params


class Command(TyperCommand):
    """A command with the help page that is described here. Raises UserError for an option that has another name now."""

    def get_params(self, ctx: Any) -> Any:
        """As in typer, without types beside flags and arguments."""
        return _without_python_types(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """As in typer, without braces around what is required."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in typer, but an old name is refused with the new one, and a run's setting with the way to set it."""
        for name in (word.partition("=")[0] for word in args):
            if name in RENAMED:
                raise UserError(f"{name} is now {RENAMED[name]}; write that")
        if not ctx.ignore_unknown_options:
            names = (name for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts))
            _check_names(args, {name for name in names if name.startswith("-")})
        return super().parse_args(ctx, args)


def _check_names(args: list[str], known: set[str]) -> None:
    """Raise UserError for an option that a command has not; a command with --set tells how a run's setting is given."""
    takes_settings = "--set" in known
    for before, word in zip(["", *args], args, strict=False):
        name = word.partition("=")[0]
        is_setting = name != word and not word.startswith("-") and not before.startswith("-")
        if takes_settings and is_setting and not _is_path(word):
            raise UserError(f"{word!r} is not expected; to put a setting over the run file's, write --set {word}")
        if name.startswith("--") and name not in known:
            if not takes_settings:
                raise UserError(f"there is no option {name!r}{did_you_mean(name, known)}")
            row = foreign_named(name)
            here = f"; {row.sentence}" if row else ""
            raise UserError(
                f"there is no option {name!r}{here}; a run's settings stand in its file, or are put over it by --set KEY=VALUE"
            )


def _is_path(word: str) -> bool:
    """Whether it is meant as a run file or a folder: names of these may have an = in them."""
    return word.endswith((".yaml", ".yml")) or Path(word).exists()


class Commands(TyperGroup):
    """The group of all commands, with the help page of `Command`."""

    def get_params(self, ctx: Any) -> Any:
        """As in typer, without types beside flags and arguments."""
        return _without_python_types(super().get_params(ctx))
