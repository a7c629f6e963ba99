"""Read a DeepSpeed JSON strictly: no comments, trailing commas, duplicate keys or NaN."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from launch.errors import UserError, nearest
from launch.paths import ROOT


def load_json(path: str | Path) -> dict[str, Any]:
    """Read one JSON object strictly: no comments, trailing commas, duplicate keys or NaN.

    DeepSpeed itself accepts a laxer dialect (hjson) that Hugging Face and other tools reject.

    Raises:
        UserError: with file, line and column; if the file is missing, with the nearest file name.
    """
    path = Path(path)
    if not path.is_file():
        beside = [*path.parent.glob("*.json"), *(ROOT / "ds_configs").glob("*.json")]
        hint = nearest(path.name, {other.name for other in beside})
        raise UserError(f"{path}: no such file{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: {error}") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(path, text, error.pos, _syntax(text, error))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise UserError(f"{path}: a number with thousands of digits") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object {{...}}")
    for position, message in _beyond_syntax(text):
        _fail(path, text, position, message)
    return values


def _fail(path: Path, text: str, position: int, message: str) -> NoReturn:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    raise UserError(f"{path}:{line}:{column}: {message}")


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    at, before = text[error.pos :], text[: error.pos].rstrip()
    if at.lstrip().startswith(("//", "/*", "#")):
        return "JSON has no comments; take this one out"
    # Python 3.13 points at the comma, earlier versions at the bracket behind it.
    if (at[:1] in ("}", "]") and before.endswith(",")) or "trailing comma" in error.msg:
        return "JSON has no comma after the last entry; take it out"
    return error.msg


def _beyond_syntax(text: str) -> Iterator[tuple[int, str]]:
    """Find errors that Python's JSON parser accepts, with their positions, in parsed text."""
    open_blocks: list[set[str]] = []
    token = r'(?P<text>"(?:[^"\\]|\\.)*")(?P<colon>\s*:)?|(?P<bad>-?Infinity|NaN)|[{}\[\]]'
    for match in re.finditer(token, text):
        if match["bad"]:
            yield match.start(), f"{match['bad']} is no JSON number"
        elif match["colon"]:
            key = json.loads(match["text"])
            if key in open_blocks[-1]:
                yield match.start(), f"'{key}' is given twice in the same block; keep one"
            open_blocks[-1].add(key)
        elif match[0] in "{[":
            open_blocks.append(set())
        elif match[0] in "}]":
            open_blocks.pop()
