"""Two GPUs add up a tensor by copies, beside whatever they compute.

NCCL's all-reduce is a kernel: it takes multiprocessors from the matrix products that it is to run beside.
Two GPUs of one host can do without. Each copies its tensor into the other's memory, which is a copy
engine's work, and adds what has come to its own:

    rank 0    copy x0 into rank 1's slot    signal    wait    x0 += its slot
    rank 1    copy x1 into rank 0's slot    signal    wait    x1 += its slot

Both add the same two numbers, so both get the same bits, and those are NCCL's. A tensor goes in pieces:
one is added while the next is on its way.

Two slots, in turn, are enough. A rank begins sum n when it has added what came of sum n - 1, and the other
rank had sent that after it had added what came of n - 2. So the slot of n - 2 is free again.

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
MOST_PIECES = 16  # each has a signal of its own


class CopyEngineGroup(dist.ProcessGroup):
    """Sums over the two ranks of a group, of which each has a GPU that can read the other's memory.

    Both ranks must ask for the same sums in the same order, each with tensors of the same size.

    Args:
        group: the ranks, in a group of NCCL's.
        timeout: how long a rank waits for the other before CUDA stops it with an error.

    Raises:
        ValueError: if the group has not two ranks.
        RuntimeError: if a GPU cannot read the other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        if dist.get_world_size(group) != 2:
            raise ValueError(
                f"copies add up the tensors of 2 ranks, not {dist.get_world_size(group)}"
            )
        of_rank_and_size: Any = super().__init__  # torch types other arguments
        of_rank_and_size(dist.get_rank(group), 2)
        self._group_name, self._other = group.group_name, 1 - dist.get_rank(group)
        self._timeout = int(timeout.total_seconds() * 1000)
        self._copies, self._sums = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
        self._slot_bytes, self._slot = 0, 0
        self._memory: Any = None  # torch's handle to both ranks' slots
        self._mine = torch.empty(0)
        self._views: dict[tuple[int, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        self._make_room(PIECE_BYTES)

    def getBackendName(self) -> str:
        """What torch calls the kind of group."""
        return "copy-engine"

    def _begin(self, tensors: list[Tensor], *options: Any) -> Work:
        """Begin to add up one contiguous tensor, in place; `wait` on the result before it is read.

        torch passes the kind of sum and a timeout too.
        """
        x = tensors[0].view(-1)
        self._make_room(x.numel() * x.element_size())
        mine, theirs = self._next_slot(x)
        copied: list[torch.cuda.Event] = []
        pieces = min(MOST_PIECES, -(-x.numel() * x.element_size() // PIECE_BYTES))
        self._copies.wait_stream(torch.cuda.current_stream())
        self._copies.wait_stream(self._sums)
        parts = x.chunk(pieces)
        with torch.cuda.stream(self._copies):
            for number, (part, there) in enumerate(zip(parts, theirs.chunk(pieces), strict=True)):
                there.copy_(part, non_blocking=True)
                self._memory.put_signal(self._other, number, self._timeout)
                copied.append(self._copies.record_event())
        with torch.cuda.stream(self._sums):
            for number, (part, here) in enumerate(zip(parts, mine.chunk(pieces), strict=True)):
                self._sums.wait_event(copied[number])
                self._memory.wait_signal(self._other, number, self._timeout)
                part.add_(here)
        return _Sum(self._sums.record_event())

    allreduce: Any = _begin  # torch types it as several methods

    def _next_slot(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The other slot than last time, as `x`: this rank's and the other rank's."""
        self._slot = 1 - self._slot
        key = x.numel(), x.dtype, self._slot
        if key not in self._views:
            first = self._slot * self._slot_bytes // x.element_size()
            mine = self._mine.view(x.dtype)[first : first + x.numel()]
            theirs = self._memory.get_buffer(self._other, (x.numel(),), x.dtype, first)
            self._views[key] = mine, theirs
        return self._views[key]

    def _make_room(self, size: int) -> None:
        """Two slots of so many bytes, rounded up to a whole piece. Collective where they must grow."""
        if size <= self._slot_bytes:
            return
        from torch.distributed import _symmetric_memory as symmetric

        torch.cuda.synchronize()  # no copy may be on its way to the slots that go
        self._views.clear()
        self._slot_bytes = -(-size // PIECE_BYTES) * PIECE_BYTES
        device = torch.device("cuda", torch.cuda.current_device())
        self._mine = symmetric.empty([2 * self._slot_bytes], dtype=torch.uint8, device=device)
        self._memory = symmetric.rendezvous(self._mine, self._group_name)


class _Sum(Work):
    """A sum that has begun."""

    def __init__(self, done: torch.cuda.Event) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        """Let the current stream wait for the sum."""
        torch.cuda.current_stream().wait_event(self._done)
        return True
