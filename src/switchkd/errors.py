"""Errors that are written for the person who made the mistake."""


class UserError(ValueError):
    """Says in one sentence what was wrong, with which value, and what to do; the command line exits with code 2."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A run was stopped by Ctrl-C: says where, what is kept and how to go on; the command line exits with code 130."""
