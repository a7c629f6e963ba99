"""Count the memory of tensors: torch's allocator on a GPU, every storage on a CPU.

torch has no statistics of its allocator on a CPU, and resident memory there is mostly libraries. So
each operation's results are counted when they appear and when they are freed. What an operation
allocates and frees inside itself is not seen.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Counter(Protocol):
    """Bytes of tensors on this rank's device."""

    device: str

    def now(self) -> int:
        """Bytes allocated now."""

    def most(self) -> int:
        """The most bytes allocated at a time since the last call of this function."""

    def reserved(self) -> int:
        """The most that the allocator has held, the unused included; 0 on a CPU."""

    def used(self) -> int:
        """Bytes in use on the device by the driver's count, of all processes; 0 on a CPU."""


class _OnGPU:
    def __init__(self, device: torch.device) -> None:
        self.place = device
        self.device = torch.cuda.get_device_name(device)
        self._reserved = 0

    def now(self) -> int:
        torch.cuda.synchronize(self.place)
        return torch.cuda.memory_allocated(self.place)

    def most(self) -> int:
        torch.cuda.synchronize(self.place)
        found = torch.cuda.max_memory_allocated(self.place)
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.place))
        torch.cuda.reset_peak_memory_stats(self.place)
        return found

    def reserved(self) -> int:
        return max(self._reserved, torch.cuda.max_memory_reserved(self.place))

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.place)
        return total - free


class _OnCPU(TorchDispatchMode):
    device = "cpu"

    def __init__(self) -> None:
        base: Any = super()  # torch does not type it
        base.__init__()
        self._now = self._most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        for each in tree_flatten(result)[0]:
            if isinstance(each, Tensor) and each.device.type == "cpu":
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        # The implementation's address: the Python object of a storage may come and go before it.
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._forget, key)
        self._sizes[key] = size
        self._now += size - (before or 0)
        self._most = max(self._most, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def now(self) -> int:
        return self._now

    def most(self) -> int:
        found, self._most = self._most, self._now
        return found

    def reserved(self) -> int:
        return 0

    def used(self) -> int:
        return 0


@contextmanager
def counter(device: torch.device) -> Iterator[Counter]:
    """Count the tensors of a device within this context."""
    if device.type == "cuda":
        yield _OnGPU(device)
    else:
        with _OnCPU() as count:
            yield count
