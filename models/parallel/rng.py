"""Random numbers under tensor parallelism: dropout masks.

All ranks of a tensor group run the same default generator, so tensors that they share (the residual
stream) get the same mask on each rank. Where ranks hold different parts (heads, or tokens under
sequence parallelism), the masks must differ, or one mask would repeat over all parts.
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
    """Make the default generator of `device` draw different numbers on each rank of `group`.

    They depend only on the shared generator's state and the rank: recomputation restores that state
    (as `torch.utils.checkpoint` does) and so gets the same masks again. Megatron keeps a second
    generator instead, which its own checkpoint function must save.
    """
    if group_size(group) == 1:
        yield
        return
    cuda = device.type == "cuda"
    torch.rand(1, device=device)  # so the next region starts from another state
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
    """`F.dropout`, with a separate mask per rank if `x` is this rank's part of a tensor.

    `x` has any shape; the result has the same shape.
    """
    if not training or probability == 0.0:
        return x
    with fork_rng_per_rank(sharded_over, x.device):
        return F.dropout(x, probability)
