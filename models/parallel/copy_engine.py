"""Two GPUs add up a tensor by copies, beside whatever they compute.

NCCL's all-reduce is a kernel: it takes multiprocessors from the matrix products that it is to run beside.
Two GPUs of one host can do without. Each copies its tensor into the other's memory, which is a copy
engine's work, and adds what has come to its own:

    rank 0    copy x0 into rank 1's slot    signal    wait    x0 += its slot
    rank 1    copy x1 into rank 0's slot    signal    wait    x1 += its slot

Both add the same two numbers, so both get the same bits, and those are NCCL's. A tensor goes in pieces:
one is added while the next is on its way.

Two slots serve in turn. A rank says when it has added what was in a slot, and the other copies there no
sooner. So the order of the slots does not matter: a CUDA graph has its slots from when it was recorded.

`torch.distributed._symmetric_memory` maps the other rank's memory and has the signals. What is here is a
process group because torch's functional collectives, which compiled code calls, take groups by name.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Work

PIECE_BYTES = 2**24
MOST_PIECES = 16
_ALIGNMENT = 512  # bytes, as torch's allocator aligns


class CopyEngineGroup(dist.ProcessGroup):
    """Sums over the two ranks of a group, of which each has a GPU that can read the other's memory.

    Both ranks must ask for the same sums in the same order, each with tensors of the same size.

    Args:
        group: the ranks, in a group of NCCL's.
        most_bytes: of a tensor. Each rank has memory for two such tensors.
        timeout: how long a rank waits for the other before CUDA stops it with an error.

    Raises:
        ValueError: if the group has not two ranks.
        RuntimeError: if a GPU cannot read the other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, most_bytes: int, timeout: timedelta) -> None:
        if dist.get_world_size(group) != 2:
            raise ValueError(
                f"copies add up the tensors of 2 ranks, not {dist.get_world_size(group)}"
            )
        of_rank_and_size: Any = super().__init__  # torch types other arguments
        of_rank_and_size(dist.get_rank(group), 2)
        self._copies, self._sums = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
        self._slots = _Slots(group, most_bytes, int(timeout.total_seconds() * 1000))
        self._sums_begun = 0

    def getBackendName(self) -> str:
        """What torch calls the kind of group."""
        return "copy-engine"

    def _begin(self, tensors: list[Tensor], *options: Any) -> Work:
        """Begin to add up one contiguous tensor, in place; `wait` on the result before it is read.

        torch passes the kind of sum and a timeout too.
        """
        x = tensors[0].view(-1)
        slots, slot = self._slots, self._sums_begun % 2
        self._sums_begun += 1
        mine, theirs = slots.as_tensors(x, slot)
        copied: list[torch.cuda.Event] = []
        pieces = min(MOST_PIECES, -(-x.numel() * x.element_size() // PIECE_BYTES))
        self._copies.wait_stream(torch.cuda.current_stream())
        parts = x.chunk(pieces)
        with torch.cuda.stream(self._copies):
            slots.wait(slot, _FREE)
            for number, (part, there) in enumerate(zip(parts, theirs.chunk(pieces), strict=True)):
                there.copy_(part, non_blocking=True)
                slots.signal(slot, number)
                copied.append(self._copies.record_event())
        with torch.cuda.stream(self._sums):
            for number, (part, here) in enumerate(zip(parts, mine.chunk(pieces), strict=True)):
                self._sums.wait_event(copied[number])
                slots.wait(slot, number)
                part.add_(here)
            slots.signal(slot, _FREE)
        return _Sum(self._sums.record_event())

    allreduce: Any = _begin  # torch types it as several methods


# The number of the signal which says that a slot is free. Those before it are of pieces.
_FREE = MOST_PIECES


class _Slots:
    """Two slots on each of two ranks, and the signals that go with them."""

    def __init__(self, group: Any, most_bytes: int, timeout: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self._other, self._timeout = 1 - dist.get_rank(group), timeout
        self._size = -(-most_bytes // _ALIGNMENT) * _ALIGNMENT
        device = torch.device("cuda", torch.cuda.current_device())
        self._mine = symmetric.empty([2 * self._size], dtype=torch.uint8, device=device)
        self._memory: Any = symmetric.rendezvous(self._mine, group.group_name)
        self._views: dict[tuple[int, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        for slot in (0, 1):
            self.signal(slot, _FREE)

    def signal(self, slot: int, number: int) -> None:
        """Give the other rank a signal, after what the current stream has to do; it has one of each."""
        self._memory.put_signal(self._other, slot * (_FREE + 1) + number, self._timeout)

    def wait(self, slot: int, number: int) -> None:
        """Let the current stream wait for the other rank's signal, and take it."""
        self._memory.wait_signal(self._other, slot * (_FREE + 1) + number, self._timeout)

    def as_tensors(self, x: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """This rank's slot and the other rank's, each as a tensor like `x`."""
        key = x.numel(), x.dtype, slot
        if key not in self._views:
            first = slot * self._size // x.element_size()
            mine = self._mine.view(x.dtype)[first : first + x.numel()]
            theirs = self._memory.get_buffer(self._other, (x.numel(),), x.dtype, first)
            self._views[key] = mine, theirs
        return self._views[key]


class _Sum(Work):
    """A sum that has begun."""

    def __init__(self, done: torch.cuda.Event) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        """Let the current stream wait for the sum."""
        torch.cuda.current_stream().wait_event(self._done)
        return True
