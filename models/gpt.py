"""One decoder for the GPT-2, Llama and Qwen families, on one device or sharded over tensor ranks.

Read it from top to bottom: MLP, block, embedding, output, model. Attention is in `attention.py`,
the norms are in `norms.py`. Shapes are written as `[batch, sequence, hidden]`.

With the default `tp` (one rank), every layer is torch's own: this is the reference for all layouts.
With more ranks, the two pairs of linear layers in a block are column- and row-parallel, and each
rank holds a shard (`models/parallel/`). In the shapes below, `/ ranks` marks a sharded dimension.

In every layout, checkpoints, weights files and parity tables use these parameter names (the
canonical names). Matrices follow torch: `[out, in]`.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, AttentionInputs, attention_inputs
from models.config import GPTConfig
from models.norms import make_norm
from models.parallel.collectives import gather_from_group, scatter_to_group
from models.parallel.cross_entropy import vocab_parallel_cross_entropy
from models.parallel.rng import dropout
from models.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from models.parallel.topology import ONE_RANK, TensorParallel


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, `x / 2 (1 + tanh(u))` with u = sqrt(2 / pi) (x + 0.044715 x^3); any shape.

    Source: arXiv:1606.08415, section 2. Compiled code computes the same as `x sigmoid(2u)`: a GPU has an
    instruction for exp, and takes many for tanh.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


class MLP(nn.Module):
    """`down(gelu(up(x)))`, or SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

    SwiGLU's `up` holds the rows of gate, then those of up, so one matrix product computes both.
    Weights: up is `[ffn, hidden]` (gated: 2 ffn rows), and a rank holds rows / ranks of each part;
    down is `[hidden, ffn]`, and a rank holds columns / ranks.

    With `chunks` above 1, it works on so many chunks of the sequence, one after the other, and again in
    the backward pass (arXiv:2506.13996, its TiledMLP): what is `ffn` wide exists for one chunk at a time.
    """

    def __init__(self, config: GPTConfig, tp: TensorParallel, chunks: int = 1) -> None:
        super().__init__()
        self.gated, self.chunks = config.mlp == "swiglu", chunks
        parts = [config.ffn] * (2 if self.gated else 1)
        self.up = ColumnParallelLinear(
            config.hidden, parts, config.bias, tp.group, tp.sequence_parallel
        )
        self.down = RowParallelLinear(
            config.ffn, config.hidden, config.bias, tp.group, tp.sequence_parallel
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as `Attention.forward`; in between, `[batch, sequence, ffn / ranks]`."""
        if self.chunks == 1:
            return self._at_once(x)
        chunks = x.chunk(self.chunks, 1)  # fewer than `chunks` of a short sequence
        return torch.cat([checkpoint(self._at_once, c, use_reentrant=False) for c in chunks], 1)

    def _at_once(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = gelu(x)
        down: Tensor = self.down(x)
        return down


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, tp: TensorParallel, mlp_chunks: int = 1) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, tp)
        self.attention = Attention(config, tp)
        self.mlp_norm = make_norm(config, tp)
        self.mlp = MLP(config, tp, mlp_chunks)
        self.dropout = config.dropout
        self.sequence_group = tp.sequence_group

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """`[batch, sequence, hidden]` (sequence parallel: sequence / ranks) to the same shape."""
        x = x + self._dropout(self.attention(self.attention_norm(x), inputs))
        return x + self._dropout(self.mlp(self.mlp_norm(x)))

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training, self.sequence_group)


class Embedding(nn.Module):
    """Token embeddings, plus learned positions if the config asks for them."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.token = VocabParallelEmbedding(config.vocab, config.hidden, tp.group)
        self.position = Position(config, tp)

    def forward(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """`[batch, sequence]` token ids to `[batch, sequence, hidden]` (see `Position.forward`)."""
        x: Tensor = self.position(self.token(tokens), positions)
        return x


class Position(nn.Module):
    """Adds learned positions, if the config has them; the entry to the residual stream."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        if config.position == "learned":
            self.weight = nn.Parameter(torch.empty(config.context, config.hidden))
        self.learned = config.position == "learned"
        self.dropout = config.dropout
        self.sequence_group = tp.sequence_group

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`[batch, sequence, hidden]`, whole on every rank, to the same shape.

        `positions` is `[batch, sequence]`; with None, each row counts from 0. With sequence
        parallelism, the result is this rank's `[batch, sequence / ranks, hidden]`. The weight
        `[context, hidden]` is whole on every rank.
        """
        if self.learned:
            x = x + (self.weight[: x.shape[1]] if positions is None else self.weight[positions])
        return scatter_to_group(dropout(x, self.dropout, self.training), 1, self.sequence_group)


class Output(ColumnParallelLinear):
    """The projection onto the vocabulary.

    Weight: `[vocab, hidden]`, per rank `[ceil(vocab / ranks), hidden]`; so logits are
    `[batch, sequence, ceil(vocab / ranks)]`.
    """

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__(
            config.hidden, [config.vocab], False, tp.group, tp.sequence_parallel, pad=True
        )


class Loss(nn.Module):
    """The loss from vocab-parallel logits. A module, so that it can be compiled by itself."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.vocab, self.group = config.vocab, tp.group

    def forward(self, logits: Tensor, labels: Tensor, loss_weights: Tensor | None) -> Tensor:
        """`[batch, sequence, ceil(vocab / ranks)]` and `[batch, sequence]` to the summed loss."""
        return vocab_parallel_cross_entropy(logits, labels, loss_weights, self.vocab, self.group)


class GPT(nn.Module):
    """The decoder: embedding, blocks, a final norm, and the projection onto the vocabulary.

    With `checkpoint_activations`, a block keeps only its input for the backward pass and recomputes
    the rest (arXiv:1604.06174); with `cpu_checkpointing`, that input waits in host memory. With
    `loss_chunks` above 1, the output projection with the loss keeps its input alone too, in so many
    chunks of the sequence: the logits of one chunk exist at a time. `mlp_chunks` is `MLP`'s.
    """

    def __init__(
        self,
        config: GPTConfig,
        checkpoint_activations: bool = False,
        tp: TensorParallel = ONE_RANK,
        *,
        cpu_checkpointing: bool = False,
        mlp_chunks: int = 1,
        loss_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.checkpoint_activations = checkpoint_activations
        self.cpu_checkpointing, self.loss_chunks = cpu_checkpointing, loss_chunks
        self.embedding = Embedding(config, tp)
        self.blocks = nn.ModuleList(Block(config, tp, mlp_chunks) for _ in range(config.layers))
        self.norm = make_norm(config, tp)
        self.output = Output(config, tp)
        self.loss = Loss(config, tp)
        if config.tied:
            self.output.weight = self.embedding.token.weight

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits `[batch, sequence, vocab]`, or the summed loss (a scalar) if `labels` are given.

        All arguments are `[batch, sequence]`. `labels[:, i]` is the token that follows
        `tokens[:, i]`; its loss is weighted by `loss_weights[:, i]` (None: 1). `positions` mark
        where documents begin (see `attention_inputs`). Both results are the same on every tensor
        rank.
        """
        inputs = attention_inputs(self.config, tokens.shape[1], positions, tokens.device)
        x = self.embedding(tokens, positions)
        recompute = self.checkpoint_activations and self.training
        for block in self.blocks:
            x = run_block(block, x, inputs, recompute, self.cpu_checkpointing)
        x = self.norm(x)
        if labels is None:
            return gather_from_group(self.output(x), -1, self.tp.group)[..., : self.config.vocab]
        if self.loss_chunks == 1:
            return self._summed_loss(x, labels, loss_weights)
        return self._summed_loss_in_chunks(x, labels, loss_weights)

    def _summed_loss(self, x: Tensor, labels: Tensor, loss_weights: Tensor | None) -> Tensor:
        loss: Tensor = self.loss(self.output(x), labels, loss_weights)
        return loss

    def _summed_loss_in_chunks(
        self, x: Tensor, labels: Tensor, loss_weights: Tensor | None
    ) -> Tensor:
        n = self.loss_chunks
        chunks = x.chunk(n, 1)  # fewer than n of a short sequence
        weights = [None] * len(chunks) if loss_weights is None else loss_weights.chunk(n, 1)
        losses = [
            checkpoint(self._summed_loss, *chunk, use_reentrant=False)
            for chunk in zip(chunks, labels.chunk(n, 1), weights, strict=True)
        ]
        return torch.stack(losses).sum()


def run_block(
    block: nn.Module, x: Tensor, inputs: AttentionInputs, recompute: bool, on_cpu: bool = False
) -> Tensor:
    """A block's output; with `recompute`, the backward pass recomputes the block.

    With `on_cpu` too, `x` waits for that in host memory, pinned if it came from a GPU.
    """
    out: Tensor
    with save_on_cpu(pin_memory=x.is_cuda) if recompute and on_cpu else nullcontext():
        out = checkpoint(block, x, inputs, use_reentrant=False) if recompute else block(x, inputs)
    return out
