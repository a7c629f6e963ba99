"""Layouts to go from and to, and runs of them inside `run_ranks`: save, load, and train on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from launch.config.resolve import merge
from tests.resume.runs import values

FP32: dict[str, Any] = {"bf16": {"enabled": False}}
BEFORE, AFTER = 3, 5  # steps before the save, and after it
State = dict[tuple[str, str], Tensor]  # by parameter and kind, whole


@dataclass(frozen=True)
class Layout:
    """Ranks, a JSON with changes, and the sizes of the grid."""

    ranks: int
    json: str
    changes: dict[str, Any] = field(default_factory=lambda: FP32)
    parallel: dict[str, Any] = field(default_factory=dict)


LAYOUTS: dict[str, Layout] = {
    "one device": Layout(1, "zero0_fp32"),
    "stage 0, data 2": Layout(2, "zero0_fp32"),
    "stage 1, data 2": Layout(2, "zero1"),
    "stage 2, data 4": Layout(4, "zero2"),
    "stage 3, data 2": Layout(2, "zero3"),
    "stage 3, data 4": Layout(4, "zero3"),
    "stage 2, data 2, optimizer on the CPU": Layout(2, "zero2_offload_cpu"),
    "stage 3, data 2, all on a disk": Layout(2, "zero3_offload_nvme"),
    "tensor 2, stage 1": Layout(2, "zero1", parallel={"tensor": 2}),
    "tensor 2 x data 2, sequence, stage 3": Layout(
        4, "zero3", parallel={"tensor": 2, "sequence": True}
    ),
    "pipeline 2, stage 0": Layout(2, "zero0_fp32", parallel={"pipeline": 2}),
    "pipeline 2 x tensor 2, stage 1": Layout(4, "zero1", parallel={"pipeline": 2, "tensor": 2}),
    "pipeline 2 x data 2, stage 1": Layout(4, "zero1", parallel={"pipeline": 2}),
    "pipeline 2, zb-h1, stage 1": Layout(2, "zero1", parallel={"pipeline": 2, "schedule": "zb-h1"}),
    "pipeline 2, interleaved, stage 1": Layout(
        2, "zero1", parallel={"pipeline": 2, "schedule": "interleaved", "model_chunks": 2}
    ),
}
LAYERS = 5
# Three query heads' worth of keys for two tensor ranks, a vocabulary that they pad, and tied weights.
MODEL = {"layers": LAYERS, "hidden": 48, "heads": 4, "vocab": 259, "context": 32, "dropout": 0.0,
         "bias": True, "tied": True}  # fmt: skip


def recipe(folder: Path, name: str, **model: Any) -> dict[str, Any]:
    """The values of the same run in a layout; `model` changes the model."""
    layout = LAYOUTS[name]
    zero: dict[str, Any] = {}
    if "disk" in name:
        swap = {"nvme_path": str(folder / "swap")}
        zero = {"zero_optimization": {
            "offload_optimizer": swap,
            "offload_param": {**swap, "buffer_size": 300_000, "max_in_cpu": 0},
        }}  # fmt: skip
    block = merge(zero, {"config": f"ds_configs/{layout.json}.json", **layout.changes})
    found = values(folder, "run", **block)
    found["model"] = MODEL | model
    found["parallel"] = layout.parallel
    if "path" in model:
        found["model"] = {"family": "hf", **model}
    # A large eps: otherwise Adam makes a difference of rounding in a gradient near zero as large as a step.
    found["deepspeed"]["optimizer"] = {"params": {"lr": 1e-2, "eps": 1e-3}}
    found["train"] |= {"steps": BEFORE + AFTER, "eval_every": 0}
    return found


def save_then_train(recipe: dict[str, Any], folder: Path) -> list[float]:
    """Train, save to `folder/checkpoints`, and train on; the losses after the save."""
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    with local_engine(recipe, folder) as local:
        for step in range(BEFORE):
            train_step(local.engine, local.batch(step))
        saver(local, folder).save(BEFORE)
        return [
            train_step(local.engine, local.batch(step)).loss
            for step in range(BEFORE, BEFORE + AFTER)
        ]


def load_each(
    recipe: dict[str, Any], sources: list[Path], target: Path, steps: int
) -> list[list[float]]:
    """Load one checkpoint after another into one engine: save it again, and train on for `steps`.

    The first step saved is that of `sources[0]`, to `target/0/checkpoints`, and so on.
    """
    from launch.checkpoint.load import load
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    losses = []
    with local_engine(recipe, target) as local:
        for number, source in enumerate(sources):
            load(local.engine, local.topology, local.ranks, source, identity(local))
            saver(local, target / str(number)).save(BEFORE)
            losses.append([
                train_step(local.engine, local.batch(step)).loss
                for step in range(BEFORE, BEFORE + steps)
            ])  # fmt: skip
    return losses


def identity(local: Any) -> dict[str, Any]:
    """What the manifests of these runs say."""
    from launch.checkpoint import identity

    plan = local.plan
    return identity.identity(plan.recipe, plan.ds_config, plan.layout, plan.corpus.folder.name)


def saver(local: Any, folder: Path, **settings: Any) -> Any:
    """A saver into `folder/checkpoints`."""
    from launch.checkpoint.save import Saver
    from launch.config.schema import Checkpoint
    from launch.runtime.run_dir import RunDir

    return Saver(
        local.engine, local.topology, local.ranks, RunDir(folder), identity(local),
        Checkpoint(**settings),
    )  # fmt: skip


def saved(folder: Path) -> Path:
    """The checkpoint in a folder that `save_then_train` or `load_each` has made."""
    return folder / f"checkpoints/step_{BEFORE:08d}"


def whole_state(checkpoint: Path) -> State:
    """All weights and moments of a checkpoint, put together element by element; each is there once."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    found: State = {}
    for name, entry in manifest["tensors"].items():
        for kind in entry["kinds"]:
            whole = torch.full(entry["shape"], torch.nan)
            for file, offsets, sizes in entry["pieces"]:
                place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                assert whole[place].isnan().all(), f"{name} {kind} is there twice at {offsets}"
                with safe_open(checkpoint / file, framework="pt") as tensors:
                    key = f"{name} {kind} {','.join(map(str, offsets))}"
                    whole[place] = tensors.get_tensor(key)
            assert not whole.isnan().any(), f"of {name} {kind} not all is there"
            found[name, kind] = whole
    return found


def same(one: State, other: State) -> bool:
    """Whether two states have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
