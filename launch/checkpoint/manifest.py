"""The manifest of a checkpoint lists its files and sizes, to detect damage."""

import json
from pathlib import Path

from launch.runtime.run_dir import RunDir

MANIFEST = "manifest.json"


def find_damage(checkpoint: Path) -> str | None:
    """Describe the damage to a checkpoint folder; None if every file has its recorded size."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {MANIFEST}"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def newest_complete(run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a line for each newer, damaged one."""
    rejected: list[str] = []
    for candidate in sorted(run.checkpoints.glob("step_*"), reverse=True):
        wrong = find_damage(candidate)
        if wrong is None:
            return candidate, rejected
        rejected.append(f"{candidate.name}: {wrong}")
    return None, rejected
