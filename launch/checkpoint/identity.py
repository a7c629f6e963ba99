"""Which run a checkpoint is of: what must be the same to resume it, and what may differ."""

from pathlib import Path
from typing import Any

from launch.checkpoint.manifest import read_manifest
from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.errors import UserError

# Settings that are no part of what is trained.
MAY_CHANGE = {
    "name",
    "run",
    "checkpoint",
    "train.steps",
    "train.eval_every",
    "train.eval_batches",
    "data.cache_dir",
    "model.init_from",
    # Derived from the recipe and the ranks.
    "deepspeed.train_batch_size",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
}
# How it is trained: on which ranks, and in which precision. The state is the same numbers under all, in
# fp32 or, where the JSON keeps it so, in bf16.
HOW = {
    "parallel",
    "train.micro_batch_size",
    "train.compile",
    "train.cuda_graphs",
    "model.checkpoint_activations",
    "model.cpu_checkpointing",
    "model.mlp_chunks",
    "model.loss_chunks",
    "deepspeed.zero_optimization",
    "deepspeed.aio",
    "deepspeed.bf16",
    "deepspeed.fp16",
    "deepspeed.torch_autocast",
    "deepspeed.data_types",
    "deepspeed.communication_data_type",
    "deepspeed.optimizer.params.torch_adam",
    "deepspeed.optimizer.params.fused",
    "deepspeed.tensor_parallel",
    "deepspeed.pipeline",
    "deepspeed.activation_checkpointing",
    "deepspeed.steps_per_print",
}


def identity(
    recipe: Recipe, ds_config: dict[str, Any], layout: Layout, corpus: str
) -> dict[str, Any]:
    """The settings that say which run it is; stored in each checkpoint's manifest.

    `ds_config` is the resolved JSON, and `corpus` the fingerprint of the tokens.
    """
    return {
        "world_size": layout.grid.world_size,
        "grid": dict(layout.grid.items()),
        "recipe": recipe.model_dump(mode="json", exclude={"deepspeed"}),
        "deepspeed": ds_config,
        "corpus": corpus,
    }


def check(checkpoint: Path, run_identity: dict[str, Any], steps: int) -> tuple[int, str | None]:
    """Check that a run can resume from a checkpoint.

    Returns:
        Its number of finished steps, and a line that says what the layout changes from and to; None if
        it stays.

    Raises:
        UserError: if it is of another model, optimizer or corpus, or is past the run's `steps`.
    """
    manifest = read_manifest(checkpoint)
    changed: dict[str, tuple[Any, Any]] = {}
    _compare(manifest["recipe"], run_identity["recipe"], "", changed)
    _compare(manifest["deepspeed"], run_identity["deepspeed"], "deepspeed.", changed)
    other = [f"{k} was {a!r} and is {b!r}" for k, (a, b) in changed.items() if not _under(k, HOW)]
    if other:
        raise UserError(
            f"--resume: {checkpoint} was saved by another recipe: {'; '.join(other)}; "
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
    return step, _layout_change(manifest, run_identity, changed)


def same_ranks(manifest: dict[str, Any], run_identity: dict[str, Any]) -> bool:
    """Whether each rank draws the same random numbers: for the same part of the model and the batch."""
    batch = [i["deepspeed"]["train_micro_batch_size_per_gpu"] for i in (manifest, run_identity)]
    return bool(manifest["grid"] == run_identity["grid"] and batch[0] == batch[1])


def _layout_change(
    manifest: dict[str, Any], now: dict[str, Any], changed: dict[str, tuple[Any, Any]]
) -> str | None:
    parts = []
    if manifest["grid"] != now["grid"]:
        parts.append(f"{_grid(manifest)} becomes {_grid(now)}")
    parts += [
        f"{key} {old!r} becomes {new!r}"
        for key, (old, new) in changed.items()
        if key not in ("parallel.tensor", "parallel.pipeline") and not _tunes(key)
    ]
    return "; ".join(parts) or None


def _tunes(key: str) -> bool:
    """Whether a key sets sizes and options of ZeRO, as opposed to its stage or what it offloads."""
    block, _, name = key.rpartition("zero_optimization.")
    return bool(block) and name != "stage" and not name.startswith("offload_")


def _grid(manifest: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in manifest["grid"].items())


def _under(key: str, keys: set[str]) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _compare(
    before: dict[str, Any], now: dict[str, Any], prefix: str, into: dict[str, tuple[Any, Any]]
) -> None:
    for key in sorted({*before, *now}):
        path, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if path in MAY_CHANGE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(old, new, f"{path}.", into)
        else:
            into[path] = (old, new)
