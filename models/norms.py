"""LayerNorm and RMSNorm, on one device or over ranks that hold different tokens or heads."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import GPTConfig
from models.parallel.collectives import Group, copy_to_group
from models.parallel.topology import TensorParallel


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm; ranks of `group` share weights but normalise different tokens or heads."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape. Weight gradients are summed over the ranks."""
        weight, bias = (copy_to_group(p, self.group) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (arXiv:1910.07467); `group` as for `LayerNorm` above."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape."""
        return F.rms_norm(
            x, self.normalized_shape, copy_to_group(self.weight, self.group), self.eps
        )


def norm_class(config: GPTConfig) -> type[LayerNorm] | type[RMSNorm]:
    """The norm class that the config selects."""
    return LayerNorm if config.norm == "layernorm" else RMSNorm


def make_norm(config: GPTConfig, tp: TensorParallel) -> nn.Module:
    """The config's norm for the residual stream, which sequence parallelism shards by tokens."""
    return norm_class(config)(config.hidden, config.norm_eps, tp.sequence_group)
