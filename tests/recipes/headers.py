"""What the comment lines that open a recipe say of the way it is started."""

import re
import shlex
from pathlib import Path

from launch.planner.dry_run import header


def header_commands(file: Path) -> list[list[str]]:
    """The commands in a recipe's header, as words."""
    return [shlex.split(line) for line in header(file) if line.startswith("deepspeed ")]


def stated_gpus(file: Path) -> tuple[int, int] | None:
    """The least and the most GPUs that a recipe's first line names; None for one that names none."""
    found = re.search(r"(\d+)(?: to (\d+))? GPUs?", header(file)[0])
    return (int(found[1]), int(found[2] or found[1])) if found else None


def header_ranks(file: Path) -> int:
    """The number of ranks that a recipe's own command starts.

    With a hostfile, which is not part of the recipe, that is the most that its first line names.
    """
    command = header_commands(file)[0]
    if "--num_gpus" in command:
        return int(command[command.index("--num_gpus") + 1])
    stated = stated_gpus(file)
    assert stated, f"{file.name}: the first line has to say how many GPUs the hostfile lists"
    return stated[1]
