"""What the linter of DeepSpeed configs reports."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One error or warning about one key.

    Attributes:
        key: dotted path in the JSON; empty for the file as a whole.
        level: "error" if DeepSpeed refuses to start, ignores the setting, or trains something
            else; "warning" if the setting works as documented but may surprise.
        rule: a short stable name, for filtering.
        message: one line with the problem and the fix.
    """

    key: str
    level: Level
    rule: str
    message: str

    def line(self) -> str:
        """`level: key: message [rule]`."""
        where = f"{self.key}: " if self.key else ""
        line = f"{self.level}: {where}{self.message} [{self.rule}]"
        # A key may hold a line break, or half a character.
        return line if line.isprintable() else json.dumps(line)[1:-1]

    def as_dict(self) -> dict[str, str]:
        """Plain values, for JSON output."""
        return asdict(self)


def error(key: str, rule: str, message: str) -> Finding:
    """A finding that must be fixed."""
    return Finding(key, "error", rule, message)


def warning(key: str, rule: str, message: str) -> Finding:
    """A finding worth knowing."""
    return Finding(key, "warning", rule, message)


_SHOWN = 80


def shown(value: Any) -> str:
    """A value of a JSON for a message: short, and as the JSON has it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
