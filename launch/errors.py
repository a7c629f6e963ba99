"""User errors, reported in one line, and hints at the name that the user meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix; the message says what is wrong, where, and how to fix it."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint with the valid name closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest_or_all(word: str, valid: Iterable[str]) -> str:
    """A hint with the valid name closest to `word`, or with all of them if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else f" choose from: {', '.join(names)}"
