"""Errors that are written for the person who made the mistake."""


class UserError(Exception):
    """Says in one sentence what was wrong, with which value, and what to do; the command line exits with code 2."""
