"""A batch: tokens, labels, loss weights and positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MicroBatch(NamedTuple):
    """The input of one forward pass. Every tensor is `[micro_batch, sequence]`.

    The fields are the arguments of `GPT.forward`, in the same order.
    """

    tokens: "Tensor"
    labels: "Tensor"
    loss_weights: "Tensor | None" = None
    positions: "Tensor | None" = None

    def to(self, device: "torch.device") -> "MicroBatch":
        """Move all tensors to a device; to a GPU without waiting for it."""

        def move(tensor: "Tensor") -> "Tensor":
            # From memory that is not pinned, a copy waits for all work that the GPU has been given.
            source = tensor.pin_memory() if device.type == "cuda" else tensor
            return source.to(device, non_blocking=True)

        return MicroBatch(
            move(self.tokens),
            move(self.labels),
            None if self.loss_weights is None else move(self.loss_weights),
            None if self.positions is None else move(self.positions),
        )


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch. Every tensor is `[accumulation, micro_batch, sequence]`.

    Attributes:
        tokens: int64 ids.
        labels: int64 ids of the next tokens. Already shifted; the model must not shift again.
        loss_weights: fp32, the weight of each label's loss; None: all 1.
        positions: int64, counted from 0 in each document, so each 0 starts a document and tokens
            attend only within their own document; None: each row is one document.
        total_weight: the sum of the loss weights of the global batch, over all ranks. The loss of a
            step is the weighted sum over all tokens divided by it.
    """

    tokens: "Tensor"
    labels: "Tensor"
    loss_weights: "Tensor | None"
    positions: "Tensor | None"
    total_weight: float

    def __len__(self) -> int:
        """The number of micro batches."""
        return len(self.tokens)

    def micro_batches(self) -> Iterator[MicroBatch]:
        """The micro batches, in execution order."""
        for i in range(len(self)):
            yield MicroBatch(
                self.tokens[i],
                self.labels[i],
                None if self.loss_weights is None else self.loss_weights[i],
                None if self.positions is None else self.positions[i],
            )


class ValidationSet(NamedTuple):
    """A rank's micro batches of the fixed validation set, and the label weight of all ranks."""

    micro_batches: list[MicroBatch]
    total_weight: float
