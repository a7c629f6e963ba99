"""Small runs inside `run_ranks`: a recipe's values, and a run that is killed at a chosen step."""

import os
import signal
from pathlib import Path
from typing import Any

from launch.config.load import recipe_from_dict
from launch.runtime.run_dir import read_metrics
from tests.ranks import run_ranks

STEPS, SAVE_EVERY = 5, 2
# What a step is, as opposed to how long it took and where.
TIMING = ("seconds", "tokens_per_second", "tflops_per_device", "memory_gib", "mfu")


def write_text(folder: Path) -> Path:
    """Sixty short documents, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        words = " ".join(f"{number * 37 + i * i:x}" for i in range(150))
        (folder / f"{number}.txt").write_text(f"document {number}: {words}\n")
    return folder


def values(folder: Path, run: str = "run", **deepspeed: Any) -> dict[str, Any]:
    """A recipe of 60 thousand parameters that writes to `folder/run`, with dropout and warm-up.

    `deepspeed` is the recipe's block of that name.
    """
    return {
        "name": "resumed",
        "model": {"layers": 2, "hidden": 32, "heads": 2, "vocab": 320, "context": 32,
                  "dropout": 0.2},
        "data": {"source": str(folder / "text"), "sequence_length": 32,
                 "cache_dir": str(folder / "cache")},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2,
                  "schedule": {"warmup_steps": 3}, "eval_every": 2, "eval_batches": 1},
        "deepspeed": {"optimizer": {"params": {"lr": 1e-2}}, **deepspeed},
        "checkpoint": {"every": SAVE_EVERY},
        "run": {"dir": str(folder / run), "tensorboard": False, "sample_tokens": 0},
    }  # fmt: skip


def train(
    values: dict[str, Any], resume: str | None = None, kill_after: int | None = None, ranks: int = 2
) -> None:
    """Run a recipe to its end in fresh processes; `kill_after` steps, all of them get SIGKILL."""
    run_ranks(_train, ranks, values, resume, kill_after, timeout=1000)


def _train(values: dict[str, Any], resume: str | None, kill_after: int | None) -> None:
    import torch._dynamo
    from deepspeed.accelerator import get_accelerator

    import launch.train

    # Where the fork server imports Muon, its kernels are marked for compiling; these runs compile nothing.
    torch._dynamo.config.disable = True
    # DeepSpeed asks for a device that is fast at it; torch's CPU operations compute in fp16 all the same.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    if kill_after is not None:
        _kill_after(kill_after)
    launch.train.train(recipe_from_dict(values), resume)


def _kill_after(steps: int) -> None:
    import torch.distributed as dist

    import launch.training.train_step

    step, count = launch.training.train_step.train_step, iter(range(steps + 1))

    def deadly(*arguments: Any) -> Any:
        if next(count) == steps:
            dist.barrier()  # until rank 0 has logged the step before
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    vars(launch.training.train_step)["train_step"] = deadly


def files(run: Path) -> dict[str, bytes]:
    """All that a finished run's last checkpoint and final weights are made of, by name."""
    saved = run / f"checkpoints/step_{STEPS:08d}"
    found = {
        file.name: file.read_bytes() for file in saved.iterdir() if file.name != "manifest.json"
    }
    assert any(name.startswith("state_") for name in found)
    assert any(name.startswith("generators_") for name in found)
    return {**found, "model": (run / "model.safetensors").read_bytes()}


def steps_logged(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in read_metrics(run / "metrics.jsonl")
    ]
