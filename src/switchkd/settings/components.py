"""Parts that a run chooses by name: policies, divergences, methods. Ours, or those of any other package.

A part is a frozen dataclass whose fields are its settings. It is written as a name or as a mapping with a `name`; a name is
ours, that of an entry point of an installed package, or `module:NAME`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast, get_type_hints

import yaml

from switchkd.errors import UserError
from switchkd.settings.typed import typed

PartT = TypeVar("PartT")


@dataclass(frozen=True, eq=False)
class Registry(Generic[PartT]):
    """The parts of one kind by name: `own` are ours, `group` names the entry points of other packages.

    `own` holds classes to be filled with settings, or finished objects (methods).
    """

    kind: str
    group: str
    base: type[PartT]
    own: Mapping[str, type[PartT] | PartT]

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {each.name: each for each in entry_points(group=self.group)}

    @property
    def names(self) -> list[str]:
        """All names, ours first."""
        return list(dict.fromkeys([*self.own, *self._installed]))

    def find(self, name: str) -> Any:
        """The class or object of that exact name. Raises UserError, listing the choices, where there is nothing."""
        if name in self.own:
            return self.own[name]
        if name not in self._installed and ":" not in name:
            raise UserError(
                f"there is no {self.kind} named {name!r}; choose one of {', '.join(self.names)}, or module:NAME"
            )
        found = self._load(name)
        is_part = isinstance(found, self.base)
        if not is_part and not (isinstance(found, type) and issubclass(found, self.base) and is_dataclass(found)):
            raise UserError(
                f"{self.kind} {name!r} leads to {found!r}; it has to be a frozen dataclass that extends "
                f"{self.base.__module__}.{self.base.__name__}"
            )
        return found

    def _load(self, name: str) -> Any:
        return imported(self.kind, name, self._installed.get(name))

    def make(self, given: PartT | str | Mapping[str, Any], *, default: PartT | None = None) -> PartT:
        """The part that `given` describes: itself, a name, or a mapping of a `name` and settings.

        Without a name the settings change `default`. Raises UserError for an unknown name or setting, and for a value of
        another type; the part's constructor refuses what is out of range.
        """
        if isinstance(given, self.base):
            return given
        settings = self.as_mapping(given)
        name = settings.pop("name", None)
        if name is None and default is None:
            raise UserError(f"{self.kind} is {given!r}; give it a name, one of {', '.join(self.names)}, or module:NAME")
        found: Any = default if name is None else self.find(name)
        part_class = found if isinstance(found, type) else type(found)
        settable, hints = settings_of(part_class), get_type_hints(part_class)
        for key, value in settings.items():
            if key not in settable:
                takes = ", ".join(settable) or "no settings"
                raise UserError(
                    f"{key} is {value}, but {self.kind} {name or self.name_of(part_class)!r} takes {takes}; leave it out"
                )
        values = {key: typed(f"{self.kind}.{key}", value, hints[key]) for key, value in settings.items()}
        return cast(PartT, found(**values) if isinstance(found, type) else replace(found, **values))

    def as_mapping(self, given: Any) -> dict[str, Any]:
        """What was given for a part as a mapping of `name` and settings. Raises UserError where it is neither."""
        try:
            # As typed on a command line.
            value = yaml.safe_load(given) if isinstance(given, str) and given.lstrip().startswith("{") else given
        except yaml.YAMLError:
            value = None
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping):
            raise UserError(
                f"{self.kind} is {given!r}; give a name, or a mapping such as {{name: ..., setting: value}}"
            )
        return dict(value)

    def name_of(self, part_class: type[Any]) -> str:
        """The name that leads to a class: ours, or module:NAME."""
        ours = next((name for name, each in self.own.items() if each is part_class), None)
        return ours or f"{part_class.__module__}:{part_class.__qualname__}"

    def describe(self, part: PartT) -> dict[str, Any]:
        """The mapping that `make` turns into this part again."""
        return {
            "name": self.name_of(type(part)),
            **{key: getattr(part, key) for key in settings_of(type(part))},
        }


def imported(kind: str, name: str, entry: EntryPoint | None = None) -> Any:
    """What an entry point, or else a name module:NAME, leads to. Raises UserError, with `kind`, where nothing can be imported."""
    # A console script does not look into the folder that it is called from, where a researcher's module lies. Appended,
    # so that no file there takes the place of an installed package.
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds text
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        return (entry or EntryPoint(name, name, kind)).load()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{kind} {name!r} cannot be imported: {error}; check the name") from error


def settings_of(part_class: type[Any]) -> dict[str, Field[Any]]:
    """The settings of a part by name: the fields that its constructor takes."""
    return {each.name: each for each in fields(part_class) if each.init}


def setting(default: Any, sentence: str, **metadata: Any) -> Any:
    """A field of a part with its default and the sentence that help pages and docs show."""
    return field(default=default, metadata={"help": sentence, **metadata})
