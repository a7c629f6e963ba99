"""Checkpoints of a ZeRO-3 run that swaps to NVMe: DeepSpeed restores the weights alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def is_swapped(engine: DeepSpeedEngine) -> bool:
    """Whether an engine keeps its optimizer or its weights on NVMe.

    Part of the workaround `save_swapped`.
    """
    optimizer = engine.optimizer
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and (
        optimizer.swap_optimizer
        or any(flat is None for flat in optimizer.fp16_partitioned_groups_flat)
    )


def save_swapped(engine: DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Write this rank's fp32 weights and optimizer state to `folder`, a file for each sub-group.

    Defect: DeepSpeed's checkpoint of a run with an NVMe optimizer is a copy of the swap files, of which a
        new engine reads the weights alone. Adam's moments, its step count, the learning rate and every
        sub-group too small to be swapped stay those of step 0. It has no code to load weights that
        alone are on NVMe (read in the source).
    Versions: DeepSpeed 0.19.8.
    Workaround: read each sub-group back into memory, one at a time, and save it. `load_swapped` loads it.
    Proof: test_nvme.py::test_checkpoint_restores_no_optimizer_state
    """
    groups = [_settings(group) for group in engine.optimizer.optimizer.param_groups]
    torch.save(groups, folder / f"swapped_rank{rank:04d}_groups.pt")
    for index, weights, state in _in_memory(engine.optimizer):
        # Cloned: a tensor in a swap buffer would take the whole buffer along into the file.
        saved = {
            "weights": weights.detach().clone(),
            "state": {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()},
        }
        torch.save(saved, _file(folder, rank, index))


def load_swapped(engine: DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Bring this rank's fp32 weights, optimizer state and 16-bit weights to those of `folder`.

    Part of the workaround `save_swapped`.
    """
    optimizer = engine.optimizer
    saved_groups = torch.load(folder / f"swapped_rank{rank:04d}_groups.pt", weights_only=False)
    for group, saved in zip(optimizer.optimizer.param_groups, saved_groups, strict=True):
        group.update(saved)
    for index, weights, state in _in_memory(optimizer):
        file = torch.load(_file(folder, rank, index), weights_only=False)
        weights.data.copy_(file["weights"])
        for name, value in file["state"].items():
            if torch.is_tensor(value) and name in state:
                state[name].data.copy_(value)
            else:  # a new engine has no state before its first step
                state[name] = value
        optimizer._reassign_or_swap_out_partitioned_parameters(index)


@contextmanager
def without_copied_swap_files(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within it, `engine.save_checkpoint` leaves out its copy of the swap files.

    Part of the workaround `save_swapped`.
    """
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer


def load_all_but_swapped(engine: DeepSpeedEngine, checkpoint: Path) -> str | None:
    """As `engine.load_checkpoint`: the schedule and the counters, without the optimizer's part.

    Part of the workaround `save_swapped`. Returns what was loaded from, or None.
    """
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    loaded: str | None
    loaded, _ = engine._load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return loaded


def _in_memory(
    optimizer: DeepSpeedZeroOptimizer_Stage3,
) -> Iterator[tuple[int, torch.Tensor, dict[str, Any]]]:
    for index, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        yield index, weights, optimizer.optimizer.state[weights]
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _file(folder: Path, rank: int, index: int) -> Path:
    return folder / f"swapped_rank{rank:04d}_{index:05d}.pt"
