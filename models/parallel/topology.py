"""This rank's place in the grid of `grid.py`, and the process groups along its axes."""

from dataclasses import dataclass

import torch.distributed as dist

from models.parallel.collectives import Group, group_rank, group_size, sum_by_copies
from models.parallel.grid import AXES, SAMPLE_AXES, WEIGHT_AXES, Grid
from models.parallel.ring import make_ring


@dataclass(frozen=True)
class TensorParallel:
    """What the model needs to know about the topology. The default is one rank.

    `key_value_group` holds the tensor ranks that share one key/value head, if there are fewer such
    heads than ranks. `sequence_parallel` shards along the sequence the activations that tensor
    parallelism leaves whole (arXiv:2205.05198).
    """

    group: Group = None
    key_value_group: Group = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """The tensor parallel size."""
        return group_size(self.group)

    @property
    def sequence_group(self) -> Group:
        """The ranks that hold different tokens of the residual stream; None if each holds all."""
        return self.group if self.sequence_parallel else None


ONE_RANK = TensorParallel()


class Topology:
    """This rank's place in a grid, with its process groups. It is also DeepSpeed's `mpu`.

    DeepSpeed asks an mpu for its data parallel group, to average gradients and partition ZeRO's
    state, and for its model parallel group, to sum norms and detect overflows.

    Creating one is collective: every rank creates every group, in the same order.
    """

    def __init__(
        self, grid: Grid, sharing_key_values: int = 1, several_model_chunks: bool = False
    ) -> None:
        self.grid = grid
        self.coordinates = grid.coordinates(dist.get_rank())
        self.groups = {axis: _my_group(grid.groups(axis)) for axis in AXES}
        self.model_group = _my_group(grid.groups(*WEIGHT_AXES))
        self.sample_group = (
            self.groups[SAMPLE_AXES[0]]
            if len(SAMPLE_AXES) == 1
            else _my_group(grid.groups(*SAMPLE_AXES))
        )
        self.key_value_group = (
            _my_group(grid.key_value_groups(sharing_key_values)) if sharing_key_values > 1 else None
        )
        self.ring = make_ring(grid.groups("pipeline")) if several_model_chunks else None

    def tensor_parallel(self, sequence_parallel: bool = False) -> TensorParallel:
        """The model's view of this topology."""
        if self.grid["tensor"] == 1:
            return ONE_RANK
        return TensorParallel(self.groups["tensor"], self.key_value_group, sequence_parallel)

    def sum_by_copies(self, most_bytes: int) -> None:
        """Let tensor ranks add up tensors of up to `most_bytes` by copies from GPU to GPU.

        For errors, see `copy_engine.py`.
        """
        sum_by_copies(self.groups["tensor"], most_bytes)

    def get_model_parallel_rank(self) -> int:
        """This rank's index among the ranks that hold one model."""
        return group_rank(self.model_group)

    def get_model_parallel_world_size(self) -> int:
        """The number of ranks that hold one model together."""
        return group_size(self.model_group)

    def get_model_parallel_group(self) -> Group:
        """The ranks that hold one model together."""
        return self.model_group

    def get_tensor_model_parallel_rank(self) -> int:
        """The tensor coordinate; unmarked parameters count in the norm only where it is 0."""
        return self.coordinates["tensor"]

    def get_tensor_model_parallel_world_size(self) -> int:
        """The tensor parallel size."""
        return self.grid["tensor"]

    def get_tensor_model_parallel_group(self) -> Group:
        """The ranks over which each matrix is sharded."""
        return self.groups["tensor"]

    def get_data_parallel_rank(self) -> int:
        """This rank's index among those with the same weights; decides which samples it reads."""
        return group_rank(self.sample_group)

    def get_data_parallel_world_size(self) -> int:
        """The number of ranks over which gradients are averaged."""
        return group_size(self.sample_group)

    def get_data_parallel_group(self) -> Group:
        """The ranks with the same weights and different samples."""
        return self.sample_group


def _my_group(groups: list[list[int]]) -> dist.ProcessGroup:
    made: list[tuple[list[int], dist.ProcessGroup]] = [
        (ranks, dist.new_group(ranks)) for ranks in groups
    ]
    return next(group for ranks, group in made if dist.get_rank() in ranks)
