"""Save and resume exactly: a resumed run is bitwise identical to an uninterrupted one.

DeepSpeed writes weights and optimizer states; we add the states of each rank's random generators.
The data loader has no state: the step determines the global batch. A checkpoint is written under a
temporary name and renamed once the manifest lists all files with their sizes, so `step_...` is
always complete.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim.lr_scheduler import LambdaLR

from launch.checkpoint.manifest import MANIFEST
from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.deepspeed_patches.nvme_checkpoint import (
    is_swapped,
    load_all_but_swapped,
    load_swapped,
    save_swapped,
    without_copied_swap_files,
)
from launch.errors import UserError
from launch.runtime.process_group import RankInfo
from launch.runtime.rng import generator_states, set_generator_states
from launch.runtime.run_dir import RunDir

# Settings that may change when a run is resumed; any other change makes it a different run.
MAY_CHANGE = {
    "name",
    "run",
    "checkpoint",
    "train.steps",
    "train.eval_every",
    "train.eval_batches",
    "data.cache_dir",
    # Folders of swap files: their contents are in the checkpoint.
    "deepspeed.zero_optimization.offload_optimizer.nvme_path",
    "deepspeed.zero_optimization.offload_param.nvme_path",
    # Derived from the recipe and the ranks, which are compared separately.
    "deepspeed.train_batch_size",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
}


def identity(
    recipe: Recipe, ds_config: dict[str, Any], layout: Layout, corpus: str
) -> dict[str, Any]:
    """The settings that must match to resume a run; stored in each checkpoint's manifest.

    `ds_config` is the resolved JSON, and `corpus` the fingerprint of the tokens.
    """
    return {
        "world_size": layout.grid.world_size,
        "recipe": recipe.model_dump(mode="json", exclude={"deepspeed"}),
        "deepspeed": ds_config,
        "corpus": corpus,
    }


def save(
    engine: DeepSpeedEngine,
    run: RunDir,
    step: int,
    keep: int,
    run_identity: dict[str, Any],
    ranks: RankInfo,
) -> Path:
    """Write `checkpoints/step_<step>` and keep only the newest `keep`. All ranks must call this.

    `step` counts finished steps. Checkpoints of later steps are removed too: they are left over
    from before this run was resumed from an earlier checkpoint.

    Raises:
        UserError: if the disk is full or not writable. Earlier checkpoints are not touched.
    """
    unfinished = run.checkpoints / f".saving_{step:08d}"
    final = run.checkpoints / f"step_{step:08d}"
    try:
        if ranks.is_main:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            for left_over in run.checkpoints.glob(".saving_*"):
                shutil.rmtree(left_over, ignore_errors=True)
        dist.barrier()
        if is_swapped(engine):
            with without_copied_swap_files(engine):
                engine.save_checkpoint(str(run.checkpoints), tag=unfinished.name, save_latest=False)
            save_swapped(engine, unfinished, ranks.rank)
        else:
            engine.save_checkpoint(str(run.checkpoints), tag=unfinished.name, save_latest=False)
        torch.save(generator_states(), unfinished / f"generators_rank{ranks.rank:04d}.pt")
        dist.barrier()
        if ranks.is_main:
            files = {
                str(f.relative_to(unfinished)): f.stat().st_size
                for f in unfinished.rglob("*")
                if f.is_file()
            }
            manifest = {"step": step, **run_identity, "files": files}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            found = sorted(run.checkpoints.glob("step_*"))
            place = found.index(final)
            for old in (*found[: max(place + 1 - keep, 0)], *found[place + 1 :]):
                shutil.rmtree(old)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        raise _as_user_error(error, unfinished, step) from error
    return final


def _as_user_error(error: Exception, unfinished: Path, step: int) -> Exception:
    # On a full disk, the zip writer of torch.save raises a RuntimeError.
    writing = isinstance(error, OSError) or any(
        w in str(error) for w in ("PytorchStreamWriter", "iostream", "unexpected pos")
    )
    if not writing:
        return error
    folder = unfinished.parent
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    shutil.rmtree(unfinished, ignore_errors=True)
    reason = error.strerror if isinstance(error, OSError) else "torch.save could not go on"
    return UserError(
        f"checkpoint of step {step}: cannot write to {folder} ({free:.1f} GiB free): {reason}; "
        "make room, then go on with --resume auto"
    )


def check(checkpoint: Path, run_identity: dict[str, Any], steps: int) -> int:
    """Check that a run can resume from a checkpoint, and return its number of finished steps.

    Raises:
        UserError: if it was saved with a different recipe, JSON, number of ranks or corpus, or is
            past the run's `steps`.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    before, now = manifest["world_size"], run_identity["world_size"]
    if before != now:
        raise UserError(
            f"--resume: {checkpoint} was saved by {before} ranks, and these are {now}; "
            f"start {before} ranks"
        )
    changed = _differences(manifest["recipe"], run_identity["recipe"])
    changed += _differences(manifest["deepspeed"], run_identity["deepspeed"], "deepspeed.")
    if changed:
        raise UserError(
            f"--resume: {checkpoint} was saved by another recipe: {'; '.join(changed)}; "
            "set these back, or start a new run"
        )
    if manifest["corpus"] != run_identity["corpus"]:
        raise UserError(
            f"--resume: the training text is not the one that {checkpoint} was trained on "
            "(its files, or the Python that it comes with, have changed); start a new run"
        )
    step = int(manifest["step"])
    if step > steps:
        raise UserError(
            f"--resume: {checkpoint} has finished step {step}, past train.steps={steps}; "
            "raise train.steps, or resume from an earlier checkpoint"
        )
    return step


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


def _set_learning_rate(schedule: LambdaLR) -> None:
    """Set the next step's rate, which the saved one is not if the run now has more steps."""
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def load(engine: DeepSpeedEngine, checkpoint: Path, ranks: RankInfo) -> None:
    """Restore the engine and random generators from `checkpoint`. Call `check` first.

    Raises:
        UserError: if its files cannot be read although their sizes are right.
    """
    generators = checkpoint / f"generators_rank{ranks.rank:04d}.pt"
    try:
        if is_swapped(engine):
            loaded = load_all_but_swapped(engine, checkpoint)
            load_swapped(engine, checkpoint, ranks.rank)
            engine.optimizer.checkpoint_event_epilogue()
        else:
            loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise UserError(f"--resume: DeepSpeed found nothing to load in {checkpoint}")
        set_generator_states(torch.load(generators, weights_only=False))
        _set_learning_rate(engine.lr_scheduler)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise UserError(
            f"--resume: {checkpoint} cannot be read ({str(error).splitlines()[0]}); remove it and "
            "resume from an earlier one"
        ) from error
