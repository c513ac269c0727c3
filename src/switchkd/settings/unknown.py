"""What is said about a key that is no setting: what it is here if another tool has it, else the nearest of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache

from switchkd.errors import UserError, did_you_mean
from switchkd.settings.foreign import FOREIGN, Foreign


@cache
def _rows() -> tuple[Foreign, ...]:
    return tuple(row for rows in FOREIGN.values() for row in rows)


def foreign_named(key: str) -> Foreign | None:
    """The row of a key that other tools have, in any case and with dashes or underscores; None where they have none."""
    plain = key.lstrip("-").lower().replace("-", "_")
    by_name = (row for row in _rows() if plain in row.names.split())
    return next(by_name, None) or next((row for row in _rows() if row.matches(plain)), None)


def unknown_setting(key: str, origin: str, known: Iterable[str], own: Collection[str]) -> UserError:
    """The error for a key that is no setting. Of the `known` ones the nearest is named, or else `own` are listed."""
    row = foreign_named(key)
    end = f"; {row.sentence}" if row else did_you_mean(key, known, own)
    return UserError(f"there is no setting {key!r} ({origin}){end}")
