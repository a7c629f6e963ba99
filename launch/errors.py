"""User errors, reported in one line, and hints at the name that the user meant."""

import difflib
import sys
from collections.abc import Iterable
from types import TracebackType


class UserError(Exception):
    """A mistake that the user can fix; the message says what is wrong, where, and how to fix it.

    It is one line, also if it quotes a key or a value of several.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint with the valid name closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest_or_all(word: str, valid: Iterable[str]) -> str:
    """A hint with the valid name closest to `word`, or with all of them if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else f" choose from: {', '.join(names)}"


def missing_package(error: BaseException) -> str | None:
    """What to do about a package that this Python lacks; None for any other error."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name in ("", "launch", "models", "scripts"):  # one of ours is missing by a defect of ours
        return None
    return f"{sys.executable} has no {name}; run: make setup, and use .venv/bin/python"


def explain_missing_packages() -> None:
    """From here on, have a missing package end the program with one line instead of a traceback."""

    def explain(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if message := missing_package(error):
            print(f"error: {message}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain
