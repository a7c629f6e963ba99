"""Random numbers under tensor parallelism: dropout's masks.

All ranks of a tensor group run the same default generator, so what they share (the residual stream)
gets the same mask on each. Where ranks hold different parts (heads, or tokens under sequence
parallelism) the masks have to differ, or one mask would repeat over all parts.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parallel.collectives import Group, group_rank, group_size


@contextmanager
def fork_rng_per_rank(group: Group, device: torch.device) -> Iterator[None]:
    """Within it, the default generator of `device` draws numbers that differ by rank of `group`.

    They follow from where the shared generator is, and from nothing else: recomputation, which puts
    the shared generator back (`torch.utils.checkpoint` does), gets the same masks again. Megatron
    keeps a second generator instead, which its own checkpoint function has to save.
    """
    if group_size(group) == 1:
        yield
        return
    cuda = device.type == "cuda"
    torch.rand(1, device=device)  # so that the next region starts elsewhere
    shared = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    digest = hashlib.blake2b(shared.numpy().tobytes(), digest_size=7, salt=b"tensor rank")
    digest.update(group_rank(group).to_bytes(4, "little"))
    seed = int.from_bytes(digest.digest(), "little")
    if cuda:
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_rng_state(shared, device)
        else:
            torch.set_rng_state(shared)


def dropout(x: Tensor, probability: float, training: bool, sharded_over: Group = None) -> Tensor:
    """`F.dropout`; where `x` is this rank's part of a tensor, with a mask of its own.

    `x` has any shape, and so has the result.
    """
    if not training or probability == 0.0:
        return x
    with fork_rng_per_rank(sharded_over, x.device):
        return F.dropout(x, probability)
