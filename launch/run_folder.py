"""Where a run writes, and which checkpoint it goes on from.

runs/<recipe>/<time>/
    recipe.yaml        the resolved recipe
    deepspeed.json     the resolved configuration
    environment.json   versions, devices, commit, command; of earlier starts too
    metrics.jsonl      one object a step
    tensorboard/       the same, for TensorBoard
    checkpoints/step_00000500/ ...
    model.safetensors  the final weights
    loss.png, sample.txt, summary.json
    job/               what scripts/submit.py wrote: scripts, the recipe, a log a rank
    STOP               touch it, and the run saves and ends
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from launch.errors import UserError
from launch.recipe import ROOT, Recipe, recipe_from_dict

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder that holds one folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def stop(self) -> Path:
        """Touched by whoever wants the run to save and end (`launch/stop.py`)."""
        return self.path / "STOP"

    @property
    def summary(self) -> Path:
        """What came out; it exists only when the run has finished."""
        return self.path / "summary.json"


@dataclass(frozen=True)
class Start:
    """The folder to write to, the checkpoint to go on from (None: step 0), and why, in a line."""

    folder: RunFolder
    checkpoint: Path | None
    message: str


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where each file has its recorded size."""
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


def newest_complete(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line for each newer one that is damaged."""
    refused: list[str] = []
    for candidate in sorted(run.checkpoints.glob("step_*"), reverse=True):
        wrong = damage(candidate)
        if wrong is None:
            return candidate, refused
        refused.append(f"{candidate.name}: {wrong}")
    return None, refused


def choose_start(recipe: Recipe, resume: str | None) -> Start:
    """Where this run writes and starts; `resume` is None, "auto", or a run's or checkpoint's path.

    Raises:
        UserError: where the path holds no complete checkpoint, where the folder already holds a
            run that is not to be resumed, or where all of its checkpoints are damaged.
    """
    parent = ROOT / "runs" / recipe.name
    fixed = RunFolder(Path(recipe.run.dir).expanduser().absolute()) if recipe.run.dir else None
    if resume is None:
        if fixed and fixed.metrics.exists():
            raise UserError(
                f"run.dir: {fixed.path} already holds a run; go on with it by --resume auto, "
                "or name another folder"
            )
        fresh = fixed or RunFolder(_new_folder(parent))
        return Start(fresh, None, f"a new run in {fresh.path}")
    if resume != "auto":
        start = _start_at_path(Path(resume).expanduser().absolute())
        if fixed and fixed.path.resolve() != start.folder.path.resolve():
            raise UserError(
                f"--resume: it names a run in {start.folder.path}, and run.dir is {fixed.path}; "
                "leave one of the two out"
            )
        return start
    runs = [fixed] if fixed else [RunFolder(p) for p in sorted(parent.glob("*"), reverse=True)]
    passed_over: list[str] = []
    for run in runs:
        found, refused = newest_complete(run)
        if found:
            return Start(run, found, _describe(found, [*passed_over, *refused]))
        if refused:
            raise UserError(
                f"--resume auto: every checkpoint of {run.path} is damaged ({'; '.join(refused)}); "
                "remove the folder to start from step 0"
            )
        unfinished = [path.name for path in run.checkpoints.glob(".saving_*")]
        if run.metrics.exists() or unfinished:
            passed_over.append(f"{run.path.name}: {', '.join(unfinished) or 'no checkpoint'}")
    where = fixed.path if fixed else parent
    fresh = fixed or RunFolder(_new_folder(parent))
    seen = f" (passed over {'; '.join(passed_over)})" if passed_over else ""
    message = f"no complete checkpoint under {where}{seen}: starting at step 0 in {fresh.path}"
    return Start(fresh, None, message)


def _start_at_path(path: Path) -> Start:
    if not path.is_dir():
        raise UserError(f"--resume: there is no folder {path}; give a run's or a checkpoint's")
    if path.name.startswith("step_") or (path / MANIFEST).exists():
        wrong = damage(path)
        if wrong:
            raise UserError(
                f"--resume: {path} is not a complete checkpoint: {wrong}; name another one, or the "
                "run's folder for its newest complete one"
            )
        return Start(RunFolder(path.parent.parent), path, _describe(path, []))
    run = RunFolder(path)
    found, refused = newest_complete(run)
    if not found:
        reasons = "; ".join(refused) or "none was saved"
        raise UserError(
            f"--resume: {path} has no complete checkpoint ({reasons}); name another run's folder, "
            "or start a new run without --resume"
        )
    return Start(run, found, _describe(found, refused))


def _describe(checkpoint: Path, refused: list[str]) -> str:
    step = json.loads((checkpoint / MANIFEST).read_text())["step"]
    passed_over = f" (passed over {'; '.join(refused)})" if refused else ""
    return f"resuming after step {step} from {checkpoint}{passed_over}"


def _new_folder(parent: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, number = parent / stamp, 1
    while True:
        try:
            path.mkdir(parents=True)  # here and now: another run may start in the same second
        except FileExistsError:
            path, number = parent / f"{stamp}-{number}", number + 1
        else:
            return path


def claim(run: RunFolder) -> FileLock:
    """Make the run's folder, and keep every other process out of it while this one lives.

    Raises:
        UserError: where it cannot be made or written to, or a run is writing to it.
    """
    lock = FileLock(run.path / ".lock")  # the kernel drops it with its holder
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run.dir: a run that has not ended is writing to {run.path}; wait for it, or name "
            "another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write to {run.path} ({error.strerror}); name a writable folder"
        ) from None
    return lock


def write_settings(
    run: RunFolder, recipe: Recipe, ds_config: dict[str, Any], world_size: int
) -> None:
    """Write recipe.yaml, deepspeed.json and environment.json; a resumed run's keeps the earlier."""
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    (run.path / "deepspeed.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    file, now = run.path / "environment.json", environment(world_size)
    try:
        before = json.loads(file.read_text())
        now["earlier"] = [*before.pop("earlier", []), before]
    except (OSError, ValueError):
        now["earlier"] = []
    file.write_text(json.dumps(now, indent=2) + "\n")


def read_settings(folder: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        UserError: where the folder is not a run's.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: not a run folder, it has no recipe.yaml")
    return recipe_from_dict(yaml.safe_load(file.read_text()), where=str(file))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def environment(world_size: int) -> dict[str, Any]:
    """What a reader needs to reproduce a run: versions, devices, commit, command."""
    import torch

    packages = ("torch", "deepspeed", "transformers", "datasets", "accelerate")
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "world_size": world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
