"""Which rank does what: the grid of pipeline x data x tensor ranks, and the groups along its axes.

Ranks are numbered with the tensor coordinate innermost, then data, then pipeline:

    rank = (stage * data + data_rank) * tensor + tensor_rank

so that a tensor group, which talks several times a layer, is a run of neighbours on one host, and
pipeline stages, which talk once a micro batch, are furthest apart (arXiv:2104.04473, section 3). It is
the order of DeepSpeed's PipeModelDataParallelTopology. On 8 ranks with tensor 2, pipeline 2:

    stage 0:  data 0: ranks 0 1     stage 1:  data 0: ranks 4 5
              data 1: ranks 2 3               data 1: ranks 6 7

    tensor groups    0 1 | 2 3 | 4 5 | 6 7   one layer's matrices, cut
    data groups      0 2 | 1 3 | 4 6 | 5 7   the same weights, other samples
    pipeline groups  0 4 | 1 5 | 2 6 | 3 7   one sample's way through the layers
    model groups     0 1 4 5 | 2 3 6 7       one whole model: its gradient norm is a sum over them
"""

from dataclasses import dataclass

import torch.distributed as dist

from models.parallel.collectives import Group, group_rank, group_size


@dataclass(frozen=True)
class TensorParallel:
    """What the model needs to know of the topology. The default is a model on one rank.

    `key_value_group` are the tensor ranks that share one key/value head, where there are fewer such
    heads than ranks. `sequence_parallel` cuts along the sequence what tensor parallelism leaves whole
    (arXiv:2205.05198).
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
        """The ranks that hold different tokens of the residual stream; None where all hold all."""
        return self.group if self.sequence_parallel else None


ONE_RANK = TensorParallel()


@dataclass(frozen=True)
class Grid:
    """The arithmetic of the grid: sizes of its axes, without any process group."""

    tensor: int
    pipeline: int
    data: int

    def rank(self, stage: int, data: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (stage * self.data + data) * self.tensor + tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(stage, data rank, tensor rank) of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        stage, data = divmod(rest, self.data)
        return stage, data, tensor

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks of every group along an axis: "tensor", "data", "pipeline" or "model"."""
        stages, datas, tensors = range(self.pipeline), range(self.data), range(self.tensor)
        if axis == "tensor":
            return [[self.rank(s, d, t) for t in tensors] for s in stages for d in datas]
        if axis == "data":
            return [[self.rank(s, d, t) for d in datas] for s in stages for t in tensors]
        if axis == "pipeline":
            return [[self.rank(s, d, t) for s in stages] for d in datas for t in tensors]
        if axis == "model":
            return [[self.rank(s, d, t) for s in stages for t in tensors] for d in datas]
        raise ValueError(f"no axis '{axis}'; choose tensor, data, pipeline or model")

    def key_value_groups(self, sharing: int) -> list[list[int]]:
        """Each tensor group in runs of `sharing` ranks, which have one key/value head in common."""
        return [
            ranks[first : first + sharing]
            for ranks in self.groups("tensor")
            for first in range(0, self.tensor, sharing)
        ]


class Topology:
    """This rank's place in a grid, with its process groups. It is also DeepSpeed's `mpu`.

    DeepSpeed asks an mpu for its data parallel group, over which gradients are averaged and ZeRO cuts,
    and for its model parallel group, over which norms are summed and overflows are found.

    A collective: every rank makes every group, in the same order.
    """

    def __init__(self, grid: Grid, sharing_key_values: int = 1) -> None:
        self.grid = grid
        self.stage, self.data_rank, self.tensor_rank = grid.coordinates(dist.get_rank())
        self.tensor_group = _my_group(grid.groups("tensor"))
        self.data_group = _my_group(grid.groups("data"))
        self.pipeline_group = _my_group(grid.groups("pipeline"))
        self.model_group = _my_group(grid.groups("model"))
        self.key_value_group = (
            _my_group(grid.key_value_groups(sharing_key_values)) if sharing_key_values > 1 else None
        )

    def tensor_parallel(self, sequence_parallel: bool = False) -> TensorParallel:
        """The model's view of this."""
        if self.grid.tensor == 1:
            return ONE_RANK
        return TensorParallel(self.tensor_group, self.key_value_group, sequence_parallel)

    def get_model_parallel_rank(self) -> int:
        """This rank's place among those that hold one model."""
        return group_rank(self.model_group)

    def get_model_parallel_world_size(self) -> int:
        """Over how many ranks one model is cut."""
        return group_size(self.model_group)

    def get_model_parallel_group(self) -> Group:
        """The ranks that hold one model together."""
        return self.model_group

    def get_tensor_model_parallel_rank(self) -> int:
        """The tensor coordinate: where it is 0, a parameter without a mark is counted in the norm."""
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """The tensor parallel size."""
        return self.grid.tensor

    def get_tensor_model_parallel_group(self) -> Group:
        """The ranks among which each matrix is cut."""
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        """The data coordinate: which samples this rank reads."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """The data parallel size."""
        return self.grid.data

    def get_data_parallel_group(self) -> Group:
        """The ranks with the same weights and other samples."""
        return self.data_group


def _my_group(groups: list[list[int]]) -> dist.ProcessGroup:
    made: list[tuple[list[int], dist.ProcessGroup]] = [
        (ranks, dist.new_group(ranks)) for ranks in groups
    ]
    return next(group for ranks, group in made if dist.get_rank() in ranks)
