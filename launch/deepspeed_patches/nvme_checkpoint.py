"""The state of a ZeRO-3 run that swaps to NVMe: DeepSpeed's checkpoint restores the weights alone."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def is_swapped(engine: DeepSpeedEngine) -> bool:
    """Whether an engine keeps its optimizer or its weights on NVMe.

    Part of the workaround `in_memory`.
    """
    optimizer = engine.optimizer
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and (
        optimizer.swap_optimizer
        or any(flat is None for flat in optimizer.fp16_partitioned_groups_flat)
    )


def in_memory(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[tuple[int, torch.Tensor]]:
    """Each sub-group's index and fp32 weights; what is swapped, with its state, is in memory meanwhile.

    Defect: DeepSpeed's checkpoint of a run with an NVMe optimizer is a copy of the swap files, of which a
        new engine reads the weights alone. Adam's moments, its step count, the learning rate and every
        sub-group too small to be swapped stay those of step 0. It has no code to load weights that
        alone are on NVMe (read in the source).
    Versions: DeepSpeed 0.19.8.
    Workaround: read each sub-group back into memory, one at a time, to be saved or written over.
    Proof: test_nvme.py::test_checkpoint_restores_no_optimizer_state
    """
    for index, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        yield index, weights
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)


def weights_follow(optimizer: DeepSpeedZeroOptimizer_Stage3, index: int) -> None:
    """Bring a sub-group's 16-bit weights, in memory or on NVMe, to its fp32 ones.

    Part of the workaround `in_memory`.
    """
    optimizer._reassign_or_swap_out_partitioned_parameters(index)
