"""The optimizer's parameter groups, and torch's optimizers without torch's compiler."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, with the JSON's weight_decay, and vectors (norms, biases), without decay.

    Frozen parameters are in neither.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        whole_shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(whole_shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def keep_compiler_unloaded() -> None:
    """Keep torch's optimizers from importing torch's compiler. For runs that compile nothing.

    The import takes each rank 2 s of CPU time, as long as torch's own. `step` needs it to break a compiled
    program's graph, and the other methods to be left out of it; without such a program, the methods behind
    those wrappers do the same. Where another version of torch has no wrappers, nothing changes.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    kinds: list[Any] = [
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]
    for kind in kinds:
        kind.step = torch.no_grad()(inspect.unwrap(kind.step))
