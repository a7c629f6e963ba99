"""What came of the compositions: a file with one JSON object a line, and with what they were run."""

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.certify.axes import Row, name, ranks
from launch.certify.run import Outcome
from launch.errors import UserError
from launch.runtime.run_dir import git

Record = dict[str, Any]
PACKAGES = ("torch", "deepspeed", "transformers")


def versions(device: str) -> dict[str, str]:
    """What an outcome depends on besides the row: packages, Python, device and commit."""
    found = {package: metadata.version(package) for package in PACKAGES}
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    commit = f"{git('rev-parse', '--short=10', 'HEAD') or 'unknown'}{changed}"
    return {**found, "python": platform.python_version(), "device": device, "commit": commit}


def device_name() -> str:
    """The GPU's name, or "CPU"; called in a process of its own, as it starts CUDA."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def record(row: Row, outcome: Outcome, using: dict[str, str]) -> Record:
    """An outcome as a line of the file."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {
        "composition": name(row),
        "ranks": ranks(row),
        **outcome._asdict(),
        "seconds": round(outcome.seconds, 1),
        "values": row,
        "versions": using,
        "date": today,
    }


def read(file: Path) -> list[Record]:
    """The records of a file; none if it does not exist.

    Raises:
        UserError: for a file that holds something else.
    """
    found = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            each = json.loads(line)
            found.append({**each, "composition": each["composition"], "status": each["status"]})
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{file}: line {number} is no result of this command; name another file with --out"
            ) from None
    return found


def append(file: Path, line: Record) -> None:
    """Add a record, at once and whole, so that an interrupted run loses nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())


def finished(records: Iterable[Record], using: dict[str, str]) -> set[str]:
    """The compositions that were run with these versions; what was not run then may be now."""
    return {
        each["composition"]
        for each in records
        if each["versions"] == using and each["status"] != "not run"
    }


def newest(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The last record of each composition and kind of device ("CPU" or "GPU").

    One that was not run does not take the place of one that was.
    """
    found: dict[tuple[str, str], Record] = {}
    for each in records:
        key = each["composition"], kind(each)
        if key not in found or each["status"] != "not run":
            found[key] = each
    return found


def kind(each: Record) -> str:
    """Whether it was run on "CPU" or "GPU"."""
    return "CPU" if each["versions"]["device"] == "CPU" else "GPU"
