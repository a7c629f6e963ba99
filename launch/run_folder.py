"""Where a run writes, and which checkpoint it goes on from.

runs/<recipe>/<time>/
    recipe.yaml        the resolved recipe
    deepspeed.json     the resolved configuration
    environment.json   versions, devices, commit, command
    metrics.jsonl      one object a step
    tensorboard/       the same, for TensorBoard
    checkpoints/step_00000500/ ...
    model.safetensors  the final weights
    loss.png, sample.txt, summary.json
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

import torch
import yaml

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


@dataclass(frozen=True)
class Start:
    """The folder to write to, the checkpoint to go on from (None: step 0), and why, in a line."""

    folder: RunFolder
    checkpoint: Path | None
    message: str


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where each file has its recorded size."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, size in manifest["files"].items():
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
    fixed = RunFolder(Path(recipe.run.dir)) if recipe.run.dir else None
    fresh = fixed or RunFolder(_new_path(parent))
    if resume is None:
        if fresh.metrics.exists():
            raise UserError(
                f"run.dir: {fresh.path} already holds a run; go on with it by --resume auto, "
                "or name another folder"
            )
        return Start(fresh, None, f"a new run in {fresh.path}")
    if resume != "auto":
        return _start_at_path(Path(resume))
    candidates = (
        [fixed] if fixed else [RunFolder(p) for p in sorted(parent.glob("*"), reverse=True)]
    )
    for run in candidates:
        found, refused = newest_complete(run)
        if found:
            return Start(run, found, _describe(found, refused))
        if refused:
            raise UserError(
                f"--resume auto: every checkpoint of {run.path} is damaged ({'; '.join(refused)}); "
                "remove the folder to start from step 0"
            )
    where = fixed.path if fixed else parent
    return Start(
        fresh, None, f"no complete checkpoint under {where}: starting at step 0 in {fresh.path}"
    )


def _start_at_path(path: Path) -> Start:
    if not path.is_dir():
        raise UserError(f"--resume: there is no folder {path}")
    if path.name.startswith("step_") or (path / MANIFEST).exists():
        wrong = damage(path)
        if wrong:
            raise UserError(f"--resume: {path} is not a complete checkpoint: {wrong}")
        return Start(RunFolder(path.parent.parent), path, _describe(path, []))
    run = RunFolder(path)
    found, refused = newest_complete(run)
    if not found:
        reasons = "; ".join(refused) or "none was saved"
        raise UserError(f"--resume: {path} has no complete checkpoint ({reasons})")
    return Start(run, found, _describe(found, refused))


def _describe(checkpoint: Path, refused: list[str]) -> str:
    step = json.loads((checkpoint / MANIFEST).read_text())["step"]
    passed_over = f" (passed over {'; '.join(refused)})" if refused else ""
    return f"resuming after step {step} from {checkpoint}{passed_over}"


def _new_path(parent: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, number = parent / stamp, 1
    while path.exists():
        path, number = parent / f"{stamp}-{number}", number + 1
    return path


def write_settings(
    run: RunFolder, recipe: Recipe, ds_config: dict[str, Any], world_size: int
) -> None:
    """Write recipe.yaml, deepspeed.json and environment.json."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    (run.path / "deepspeed.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    (run.path / "environment.json").write_text(json.dumps(environment(world_size), indent=2) + "\n")


def read_settings(folder: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        UserError: where the folder is not a run's.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: not a run folder, it has no recipe.yaml")
    return recipe_from_dict(yaml.safe_load(file.read_text()), where=str(file))


def environment(world_size: int) -> dict[str, Any]:
    """What a reader needs to reproduce a run: versions, devices, commit, command."""
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
