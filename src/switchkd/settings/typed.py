"""Values from a file or a command line in the type of the field that they are for, refused in words a person can act on."""

from __future__ import annotations

import types
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from switchkd.errors import UserError

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def typed(key: str, value: Any, hint: Any, origin: str = "") -> Any:
    """The value in the type that `hint` names; raises UserError with key, value, origin and the types that would do.

    Text that begins with ~/, in lists and mappings too, is a path in the home folder.
    """
    value = _at_home(value)
    # YAML 1.1 reads `no` as false, which some settings take as a word.
    for attempt in (value, "no") if value is False else (value,):
        for arm in _arms(hint):
            try:
                return _as_type(attempt, arm)
            except (ValueError, OverflowError):
                continue
    place = f" ({origin})" if origin else ""
    raise UserError(f"{key} is {value!r}{place}; it has to be {_expected(hint)}")


def _at_home(value: Any) -> Any:
    # No shell expands what stands in a file, or behind the = of --set.
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return {key: _at_home(each) for key, each in value.items()} if isinstance(value, dict) else value


def _arms(hint: Any) -> list[Any]:
    """The types of a union, text last, since it would take anything; beside an enumeration only its values are text."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    arms = sorted(get_args(hint), key=lambda arm: arm is str)
    return [arm for arm in arms if arm is not str] if any(map(_is_enum, arms)) else arms


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _is_object(hint: Any) -> bool:
    """Whether only Python can give the value: no text or mapping stands for it."""
    return isinstance(hint, type) and hint not in _KINDS and not _is_enum(hint)


_adapter = cache(TypeAdapter)


def _as_type(value: Any, hint: Any) -> Any:
    """Raises ValueError where the value does not fit."""
    if _is_object(hint):
        if isinstance(value, hint):
            return value
        raise ValueError
    if hint in (int, float):
        if isinstance(value, bool):
            raise ValueError
        # YAML 1.1 reads 5e-4 as text.
        value = float(value) if isinstance(value, str) else value
    try:
        found = _adapter(hint).validate_python(value, strict=hint in (bool, str, types.NoneType))
    except ValidationError as error:
        raise ValueError from error
    return found.value if isinstance(found, Enum) else found


def _expected(hint: Any) -> str:
    arms = [arm for arm in _arms(hint) if not _is_object(arm)]
    # Leaving a setting out needs no null: the sentence names what somebody would write.
    arms = [arm for arm in arms if arm is not types.NoneType] or arms
    if len(arms) != 1:
        return " or ".join(dict.fromkeys(map(_expected, arms))) or "left out"
    (arm,) = arms
    if get_origin(arm) is Literal:
        # As YAML writes true and false.
        words = (str(each).lower() if isinstance(each, bool) else str(each) for each in get_args(arm))
        return f"one of {', '.join(words)}"
    if _is_enum(arm):
        return f"one of {', '.join(str(member.value) for member in arm)}"
    return _KINDS.get(get_origin(arm) or arm, "left out")


def type_in_words(hint: Any) -> str:
    """What a value of the type has to be, such as "a whole number" or "one of student, teacher"."""
    return _expected(hint)
