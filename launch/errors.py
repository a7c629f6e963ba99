"""A mistake that its user can fix, told in one line; and the hint at the name that they meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake its user can fix: the message says what is wrong, where, and what to do."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that looks most like `word`; empty where none does."""
    close = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest_or_all(word: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that looks most like `word`; all of them where none does."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else f" choose from: {', '.join(names)}"
