"""The model of the probes, and its data: a few residual layers over tokens, without dropout.

DeepSpeed sees parameters, hooks and a loss; attention would change nothing for it. Names matter in one
place: its Muon leaves out parameters whose names contain "embed" or "lm_head".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from launch.versions.probes import BLOCKS, Shape

VOCABULARY, WIDTH = 32, 16
MICRO_BATCH, SEQUENCE = 2, 6  # samples of a rank, tokens of a sample


class Embedding(nn.Module):
    """Token numbers `[batch, sequence]` to vectors `[batch, sequence, WIDTH]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up."""
        return functional.embedding(tokens, self.weight)


class Block(nn.Module):
    """A residual MLP: `[batch, sequence, WIDTH]` to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Norm, up, GELU, down, and the residual."""
        added: Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + added


class Head(nn.Module):
    """Vectors to logits `[batch, sequence, VOCABULARY]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the transposed weight."""
        return functional.linear(x, self.weight)


def project(embedding: nn.Module, x: Tensor) -> Tensor:
    """Logits by the embedding's weight: the output layer of a tied model."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return functional.linear(x, weight)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all tokens, computed in fp32."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class Model(nn.Module):
    """The model on one device. Called with tokens and labels, it returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights wherever it is built
        self.shape = shape
        self.embed = Embedding()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        if not shape.tied:
            self.lm_head = Head()
        if shape.unused:
            self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of `tokens` and `labels`, both `[batch, sequence]`."""
        x = self.embed(tokens)
        for block in [self.blocks[0]] * self.shape.used_twice + list(self.blocks):
            if self.shape.recompute:
                x = checkpoint(block, x, use_reentrant=self.shape.recompute == "reentrant")
            else:
                x = block(x)
        logits = project(self.embed, x) if self.shape.tied else self.lm_head(x)
        return cross_entropy(logits, labels)

    def auxiliary_loss(self, tokens: Tensor) -> Tensor:
        """A second loss on what the first block makes of `tokens`, to be added to the first."""
        x: Tensor = self.blocks[0](self.embed(tokens))
        return x.float().square().mean()


def batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each `[MICRO_BATCH, SEQUENCE]`, of micro batch `index` of a step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    both = torch.randint(VOCABULARY, (2, MICRO_BATCH, SEQUENCE), generator=generator)
    return both[0], both[1]
