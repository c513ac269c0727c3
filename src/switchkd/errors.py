"""Errors that are written for the person who made the mistake."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# Below this, the nearest string is hardly ever the nearest meaning.
_LIKENESS = 0.75


class UserError(ValueError):
    """Says in one sentence what was wrong, with which value, and what to do; the command line exits with code 2."""


class Unreachable(UserError):  # noqa: N818 - nothing of the person's is wrong
    """What a run needs from elsewhere does not answer; training keeps what there is and stops."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A run was stopped by Ctrl-C: says where, what is kept and how to go on; the command line exits with code 130."""


def did_you_mean(word: str, known: Iterable[str], listed: Collection[str] | None = None) -> str:
    """The end of a sentence that names the known word nearest to a mistyped one, or else the `listed` ones (all known)."""
    choices = list(known)
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=_LIKENESS)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose one of {', '.join(sorted(listed or choices))}"
