"""The folders of a run's checkpoints: made aside, renamed when complete, removed under another name."""

import json
import shutil
from pathlib import Path
from typing import Any

from launch.checkpoint.manifest import LATEST, MANIFEST, sync
from launch.checkpoint.pieces import Contents
from launch.runtime.run_dir import RunDir

SAVING, REMOVING = ".saving_", ".removing_"


def prepare(run: RunDir, step: int) -> Path:
    """An empty folder for the files of a step's checkpoint. What killed runs have left is removed.

    Raises:
        OSError: if it cannot be made.
    """
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for left_over in leftovers(run):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = run.checkpoints / f"{SAVING}{step:08d}"
    folder.mkdir()
    return folder


def leftovers(run: RunDir) -> list[Path]:
    """Saves that were cut short, and checkpoints whose removal was."""
    return sorted([*run.checkpoints.glob(f"{SAVING}*"), *run.checkpoints.glob(f"{REMOVING}*")])


def commit(
    run: RunDir, folder: Path, manifest: dict[str, Any], contents: Contents, keep: int
) -> None:
    """Make a checkpoint of a folder of complete files, and remove all but the newest `keep`.

    Raises:
        RuntimeError: if not every element of every parameter has been written once: a defect of ours.
        OSError: if the disk fails.
    """
    missing = contents.missing()
    if missing:
        raise RuntimeError(
            f"checkpoint: {missing} were written; this is a defect, please report it"
        )
    manifest = {**manifest, "tensors": contents.tensors, "files": contents.files}
    _write(folder / MANIFEST, json.dumps(manifest))
    sync(folder)
    final = run.checkpoints / f"step_{manifest['step']:08d}"
    if final.exists():  # of before this run was resumed from an earlier one
        _remove(final)
    folder.rename(final)
    _write(run.checkpoints / f".{LATEST}", final.name + "\n")
    (run.checkpoints / f".{LATEST}").replace(run.checkpoints / LATEST)
    sync(run.checkpoints)
    found = sorted(run.checkpoints.glob("step_*"))
    place = found.index(final)
    for old in (*found[: max(place + 1 - keep, 0)], *found[place + 1 :]):
        _remove(old)


def discard(folder: Path) -> None:
    """Remove the files of a save that failed."""
    shutil.rmtree(folder, ignore_errors=True)


def why(error: Exception, run: RunDir, step: int) -> str:
    """A line for the user about a save that could not write."""
    folder = run.checkpoints
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return (
        f"checkpoint of step {step}: cannot write to {folder} ({free:.1f} GiB free): {reason}; "
        "make room, then go on with --resume auto"
    )


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It has another name before its first file goes."""
    doomed = checkpoint.with_name(f"{REMOVING}{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    sync(file)
