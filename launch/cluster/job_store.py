"""Records of submitted jobs, for status and cancel."""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from launch.cluster.job import Job
from launch.errors import UserError
from launch.paths import ROOT

INDEX = ROOT / "runs" / "jobs.jsonl"


@dataclass(frozen=True)
class State:
    """A job's state; `detail` is a few words, for example why it is pending."""

    kind: Literal["pending", "running", "completed", "failed", "cancelled", "unknown"]
    detail: str = ""

    @property
    def over(self) -> bool:
        """Whether this state is final."""
        return self.kind in ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Record:
    """One submission. `details` is specific to the backend: hosts, pids, a namespace."""

    id: str
    cluster: str
    recipe: str
    steps: int
    run: str
    folder: str
    details: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run is complete, not only the job."""
        return (Path(self.run) / "summary.json").exists()


def remember(job: Job, identifier: str, details: dict[str, str]) -> Record:
    """Write a submission's record to its folder, and add the folder's path to the index."""
    record = Record(
        identifier, job.cluster, job.recipe.name, job.recipe.train.steps, str(job.run),
        str(job.folder), details,
    )  # fmt: skip
    (job.folder / "job.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    INDEX.parent.mkdir(parents=True, exist_ok=True)
    with INDEX.open("a") as file:
        file.write(json.dumps({"id": identifier, "folder": str(job.folder)}) + "\n")
    return record


def records() -> list[Record]:
    """All submissions from this checkout whose folders still exist, oldest first."""
    folders: dict[str, None] = {}
    for line in INDEX.read_text().splitlines() if INDEX.exists() else []:
        folders[json.loads(line)["folder"]] = None
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):
            found.append(Record(**json.loads((Path(folder) / "job.json").read_text())))
    return found


def find(word: str) -> Record:
    """Find a submission by id, run folder or job folder.

    Raises:
        UserError: if there is none; the message lists the latest ones.
    """
    path = Path(word).expanduser().absolute()
    for file in (path / "job.json", path / "job" / "job.json"):
        if file.is_file():
            return Record(**json.loads(file.read_text()))
    known = records()
    for record in reversed(known):
        if record.id == word:
            return record
    latest = ", ".join(record.id for record in known[-5:]) or "nothing was submitted from here"
    raise UserError(f"{word}: no such job; give an id or a run folder ({latest})")
