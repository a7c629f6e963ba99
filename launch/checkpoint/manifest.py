"""The manifest lists all that a checkpoint is made of, with sizes and checksums.

format        of this layout of a checkpoint's folder
step          finished steps
world_size, grid, recipe, deepspeed, corpus    the run that saved it
engine        the counters of DeepSpeed's engine, the optimizer and the loss scale
tensors       each parameter's shape, kinds (weight, exp_avg, ...), and the boxes in the files
files         bytes and sha256
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.runtime.run_dir import RunDir

MANIFEST = "manifest.json"
LATEST = "latest"
BUFFERS = "buffers.safetensors"
FORMAT = 2
STATE_BYTES = 12  # a parameter of an Adam run: fp32 weight and two moments


def generators_file(rank: int) -> str:
    """The file with a rank's random generators."""
    return f"generators_rank{rank:04d}.json"


def checksum(file: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder's list of names onto the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        OSError, ValueError: if there is none, or it cannot be read.
    """
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return manifest


def find_damage(checkpoint: Path, checksums: bool = True) -> str | None:
    """Describe the damage to a checkpoint folder; None if every file is as it was written.

    Without `checksums`, only sizes are compared, and no file is read.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest.get("format", 1) != FORMAT:
            return "it was saved by another version of this project"
        files = manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    for name, (size, _) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if not checksums:
        return None
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = pool.map(lambda name: _checksum(checkpoint / name), expected)
        for (name, (_, digest)), now in zip(expected.items(), found, strict=True):
            if now != digest:
                return f"{name} has changed since it was saved (its sha256 differs)"
    return None


def _checksum(file: Path) -> str | None:
    try:
        return checksum(file)
    except OSError:  # a disk that cannot read it back
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
