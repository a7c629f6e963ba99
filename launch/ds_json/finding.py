"""What the linter of DeepSpeed configs reports."""

from dataclasses import asdict, dataclass
from typing import Literal

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
        return f"{self.level}: {where}{self.message} [{self.rule}]"

    def as_dict(self) -> dict[str, str]:
        """Plain values, for JSON output."""
        return asdict(self)


def error(key: str, rule: str, message: str) -> Finding:
    """A finding that must be fixed."""
    return Finding(key, "error", rule, message)


def warning(key: str, rule: str, message: str) -> Finding:
    """A finding worth knowing."""
    return Finding(key, "warning", rule, message)
