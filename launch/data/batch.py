"""A batch: tokens, what follows them, how much each counts, and where documents begin."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MicroBatch(NamedTuple):
    """What a model is given at once. Every tensor is `[micro_batch, sequence]`.

    The fields are the arguments of `GPT.forward`, in its order.
    """

    tokens: "Tensor"
    labels: "Tensor"
    loss_weights: "Tensor | None" = None
    positions: "Tensor | None" = None

    def to(self, device: "torch.device") -> "MicroBatch":
        """The same on a device."""
        return MicroBatch(
            self.tokens.to(device),
            self.labels.to(device),
            None if self.loss_weights is None else self.loss_weights.to(device),
            None if self.positions is None else self.positions.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch. Every tensor is `[accumulation, micro_batch, sequence]`.

    Attributes:
        tokens: int64 ids.
        labels: int64 ids, the token that follows each. They are shifted here, once.
        loss_weights: fp32, how much each label's loss counts; None: once.
        positions: int64, counted from 0 in each document, so that a document begins at each 0, and
            tokens see those of their own document alone; None: each row is one document.
        total_weight: the sum of the loss weights of the whole global batch, over all ranks. The loss
            of a step is the weighted sum over all tokens divided by it.
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
        """The micro batches, in the order in which they are run."""
        for i in range(len(self)):
            yield MicroBatch(
                self.tokens[i],
                self.labels[i],
                None if self.loss_weights is None else self.loss_weights[i],
                None if self.positions is None else self.positions[i],
            )


class ValidationSet(NamedTuple):
    """A rank's micro batches of the fixed validation set, and the weight of all ranks' labels."""

    micro_batches: list[MicroBatch]
    total_weight: float
