"""What ranks send each other, seen where torch runs it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(NamedTuple):
    """One collective: its name, all tensors that it is given, and its payload in bytes."""

    name: str
    shapes: list[torch.Size]
    payload: int


class Traffic(TorchDispatchMode):
    """Within it, every collective of this rank is noted, in the order in which they run."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.sent: list[Sent] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Called by torch for every operation."""
        if func.namespace == "c10d":
            given = [[t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args]
            # What a rank gives and what it gets; the larger of them is the whole.
            sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in given]
            shapes = [tensor.shape for tensors in given for tensor in tensors]
            name = func.name().split("::")[1]
            self.sent.append(Sent(name, shapes, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """The collectives alone."""
        return [sent.name for sent in self.sent]

    @property
    def shapes(self) -> list[tuple[str, list[torch.Size]]]:
        """Each with the shapes of all tensors that it is given."""
        return [(sent.name, sent.shapes) for sent in self.sent]

    @property
    def payloads(self) -> list[tuple[str, int]]:
        """Each with its payload: the whole tensor, in bytes."""
        return [(sent.name, sent.payload) for sent in self.sent]
