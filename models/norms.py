"""LayerNorm and RMSNorm, on one device or over ranks that each hold other tokens or heads."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import GPTConfig
from models.parallel.collectives import Group, copy_to_group
from models.parallel.topology import TensorParallel


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm; over `group`, each rank norms other tokens or heads with the same weights."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape. The gradients of the weights are sums over the ranks."""
        weight, bias = (copy_to_group(p, self.group) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (arXiv:1910.07467); over `group`, as `LayerNorm` above."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape."""
        return F.rms_norm(
            x, self.normalized_shape, copy_to_group(self.weight, self.group), self.eps
        )


def norm_class(config: GPTConfig) -> type[LayerNorm] | type[RMSNorm]:
    """The config's norm."""
    return LayerNorm if config.norm == "layernorm" else RMSNorm


def make_norm(config: GPTConfig, tp: TensorParallel) -> nn.Module:
    """The config's norm of the residual stream, which sequence parallelism cuts along the tokens."""
    return norm_class(config)(config.hidden, config.norm_eps, tp.sequence_group)
