"""Save and resume, exactly: a resumed run ends bit for bit like one that was never killed.

DeepSpeed writes weights and optimizer. Beside it lie each rank's random generators. The data needs
no state: the step alone says what the next global batch holds. A checkpoint is written under a name
that nobody reads, listed with the size of each file in a manifest, and renamed: what carries the
name `step_...` was complete when it got it.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from launch.distributed import Ranks
from launch.errors import UserError
from launch.layout import Layout
from launch.recipe import Recipe
from launch.run_folder import MANIFEST, RunFolder

# What may change between a save and the resumed run; anything else would be another run.
MAY_CHANGE = (
    "run",
    "checkpoint",
    "train.steps",
    "train.eval_every",
    "train.eval_batches",
    "data.cache_dir",
    "name",
)


def save(
    engine: DeepSpeedEngine,
    run: RunFolder,
    step: int,
    recipe: Recipe,
    layout: Layout,
    corpus: str,
    ranks: Ranks,
) -> Path:
    """Write `checkpoints/step_<step>` and remove all but the newest `checkpoint.keep`.

    `step` counts finished steps; `corpus` is the fingerprint of the tokens. Every rank must call.

    Raises:
        UserError: where the disk is full or not writable. Earlier checkpoints stay as they are.
    """
    unfinished = run.checkpoints / f".saving_{step:08d}"
    final = run.checkpoints / f"step_{step:08d}"
    try:
        if ranks.first:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            for left_over in (*run.checkpoints.glob(".saving_*"), final):
                shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier()
        engine.save_checkpoint(str(run.checkpoints), tag=unfinished.name, save_latest=False)
        torch.save(_generators(), unfinished / f"generators_rank{ranks.rank:04d}.pt")
        dist.barrier()
        if ranks.first:
            files = {
                str(f.relative_to(unfinished)): f.stat().st_size
                for f in unfinished.rglob("*")
                if f.is_file()
            }
            manifest = {
                "step": step,
                "world_size": layout.world_size,
                "corpus": corpus,
                "recipe": recipe.model_dump(),
                "files": files,
            }
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
            unfinished.rename(final)
            for old in sorted(run.checkpoints.glob("step_*"))[: -recipe.checkpoint.keep]:
                shutil.rmtree(old)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        raise _as_user_error(error, run.checkpoints, step) from error
    return final


def _as_user_error(error: Exception, folder: Path, step: int) -> Exception:
    # torch.save wraps a full disk into a RuntimeError of its zip writer.
    writing = isinstance(error, OSError) or any(
        w in str(error) for w in ("PytorchStreamWriter", "iostream")
    )
    if not writing:
        return error
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    return UserError(
        f"checkpoint of step {step}: cannot write to {folder} ({free:.1f} GiB free): "
        f"{str(error).splitlines()[0]}; make room, then go on with --resume auto"
    )


def load(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    recipe: Recipe,
    layout: Layout,
    corpus: str,
    ranks: Ranks,
) -> int:
    """Bring engine and generators to where `checkpoint` was saved; returns its finished steps.

    Raises:
        UserError: where the checkpoint was saved by another recipe, layout or corpus.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if manifest["world_size"] != layout.world_size:
        raise UserError(
            f"--resume: {checkpoint} was saved by {manifest['world_size']} ranks, and these are "
            f"{layout.world_size}; start {manifest['world_size']} ranks"
        )
    changed = _differences(manifest["recipe"], recipe.model_dump())
    if changed:
        raise UserError(
            f"--resume: {checkpoint} was saved by another recipe: {'; '.join(changed)}; "
            "set these back, or start a new run"
        )
    if manifest["corpus"] != corpus:
        raise UserError(
            f"--resume: the training text is not the one that {checkpoint} was trained on "
            "(its files, or the Python that it comes with, have changed); start a new run"
        )
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"--resume: DeepSpeed found nothing to load in {checkpoint}")
    _set_generators(
        torch.load(checkpoint / f"generators_rank{ranks.rank:04d}.pt", weights_only=False)
    )
    return int(manifest["step"])


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted({*before, *now}):
        path, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if path in MAY_CHANGE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{path}.")
        else:
            changed.append(f"{path} was {old!r} and is {new!r}")
    return changed


def _generators() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
