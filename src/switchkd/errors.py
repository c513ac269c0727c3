"""Errors that are written for the person who made the mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Says in one sentence what was wrong, with which value, and what to do; the command line exits with code 2."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A run was stopped by Ctrl-C: says where, what is kept and how to go on; the command line exits with code 130."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the known word nearest to a mistyped one."""
    choices = list(known)
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose one of {', '.join(sorted(choices)[:40])}, ..."
