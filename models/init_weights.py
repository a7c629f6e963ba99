"""A GPT's initial weights: the same full tensors in every layout."""

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from models.config import GPTConfig
from models.gpt import GPT
from models.parallel.tensor_parallel import Shard

Gather = Callable[[nn.Parameter], AbstractContextManager[object]]


def initialize(model: GPT, seed: int, gather: Gather = lambda _: nullcontext()) -> None:
    """Initialise a model's weights; see `initialize_parameters`."""
    initialize_parameters(model.named_parameters(), model.config, seed, gather)


def initialize_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: GPTConfig,
    seed: int,
    gather: Gather = lambda _: nullcontext(),
) -> None:
    """Draw the initial weights: normally distributed matrices, residual ones scaled down by depth.

    Each parameter has its own generator, seeded by `seed` and its canonical name, and is drawn at
    full size, even if the rank holds only a shard of it. So every layout starts from the same full
    tensors, no matter which of them a rank holds, or in which order. `gather` collects a parameter
    from the data parallel ranks while it is written (under ZeRO-3, each rank holds only a part).

    Source: GPT-2 (section 2.3) scales residual projections by 1 / sqrt(2 * layers).
    """
    residual_std = config.init_std / math.sqrt(2 * config.layers)
    for name, parameter in parameters:
        with gather(parameter), torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(parameter.device)
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            shard: Shard | None = getattr(parameter, "shard", None)
            shape = shard.whole_shape(parameter.shape) if shard else parameter.shape
            drawn = torch.empty(shape, dtype=torch.float32, device=parameter.device)
            drawn.normal_(0.0, residual_std if residual else config.init_std, generator=generator)
            parameter.copy_(shard.cut(drawn) if shard else drawn)
