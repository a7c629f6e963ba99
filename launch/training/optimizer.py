"""The optimizer's parameter groups."""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, with the JSON's weight_decay, and vectors (norms, biases), without decay."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        whole_shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(whole_shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
