"""One decoder for GPT-2 and for the Llama and Qwen line, on one device or cut over tensor ranks.

Read from top to bottom: position, norms, attention, MLP, block, model. Shapes are
written as `[batch, sequence, hidden]`; `heads * head_dim` is called the query width.

With the default `tp` (one rank) every layer is torch's own, and this is the reference for all layouts.
With more, the two linear pairs of a block are column- and row-parallel, and what a rank holds is a
shard (`models/parallel/`). In the shapes below, `/ ranks` marks what is cut.

Parameter names are the canonical names of checkpoints, weights files and parity tables, in every
layout. Matrices follow torch: `[out, in]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import GPTConfig
from models.parallel.collectives import (
    Group,
    all_gather,
    copy_to_group,
    gather_from_group,
    scatter_to_group,
)
from models.parallel.cross_entropy import vocab_parallel_cross_entropy
from models.parallel.rng import dropout, own_generator
from models.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from models.parallel.topology import ONE_RANK, TensorParallel


def rotary_table(config: GPTConfig, sequence: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles, each `[sequence, head_dim]`, in fp32.

    Computed on every forward: a buffer would be cast to bf16 with the model, and positions past
    256 are not bf16 numbers. Source: RoFormer, arXiv:2104.09864, in the half-split order of Llama.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    angles = torch.outer(torch.arange(sequence, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of numbers of a head by its position's angle.

    `x` is `[batch, heads, sequence, head_dim]`, and so is the result, in x's dtype.
    """
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm; over `group`, each rank norms other tokens or heads with the same weights."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape. The gradients of the weights are sums over the ranks."""
        weight, bias = (copy_to_group(p, self.group) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (arXiv:1910.07467); over `group`, as `LayerNorm` above."""

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape."""
        return F.rms_norm(
            x, self.normalized_shape, copy_to_group(self.weight, self.group), self.eps
        )


def norm_class(config: GPTConfig) -> type[LayerNorm] | type[RMSNorm]:
    """The config's norm."""
    return LayerNorm if config.norm == "layernorm" else RMSNorm


def make_norm(config: GPTConfig, tp: TensorParallel) -> nn.Module:
    """The config's norm of the residual stream, which sequence parallelism cuts along the tokens."""
    return norm_class(config)(config.hidden, config.norm_eps, tp.sequence_group)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv:2305.13245), cut by heads.

    `qkv` holds the rows of all query heads, then all key heads, then all value heads; on a rank, those
    of its own heads in the same order. Where there are fewer key/value heads than ranks, the rows of a
    head are cut over the ranks that share it, and its keys and values are gathered: every rank has the
    whole head to attend to, and no weight is there twice.

    Weights: qkv whole `[(heads + 2 kv_heads) * head_dim, hidden]`, on a rank its rows / ranks; out
    `[hidden, heads * head_dim]`, on a rank its columns / ranks.
    """

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.tp = tp
        widths = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        self.widths = [width // tp.size for width in widths]
        self.qkv = ColumnParallelLinear(
            config.hidden, widths, config.bias, tp.group, tp.sequence_parallel
        )
        self.out = RowParallelLinear(
            widths[0], config.hidden, config.bias, tp.group, tp.sequence_parallel
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, tp.group)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, tp.group)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[batch, sequence, hidden]`, the same on every rank, to the same; `table` is None without RoPE.

        With sequence parallelism `[batch, sequence / ranks, hidden]` to the same. In between, each rank
        attends with heads / ranks over the whole sequence.
        """
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        key, value = (all_gather(part, -1, self.tp.key_value_group) for part in (key, value))
        query, key, value = (
            # [batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (query, key, value)
        )
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        dropout_p = self.dropout if self.training else 0.0
        with own_generator(self.tp.group if dropout_p else None, x.device):
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout_p,
                is_causal=True,  # without it, each token is shown the answer it has to predict
                enable_gqa=key.shape[1] != query.shape[1],
            )
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """`down(gelu(up(x)))`, or SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

    SwiGLU's `up` holds the rows of gate, then those of up, so that one product does both. Weights: up
    whole `[ffn, hidden]` (gated: 2 ffn rows), on a rank its rows / ranks, part by part; down
    `[hidden, ffn]`, on a rank its columns / ranks.
    """

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        parts = [config.ffn] * (2 if self.gated else 1)
        self.up = ColumnParallelLinear(
            config.hidden, parts, config.bias, tp.group, tp.sequence_parallel
        )
        self.down = RowParallelLinear(
            config.ffn, config.hidden, config.bias, tp.group, tp.sequence_parallel
        )

    def forward(self, x: Tensor) -> Tensor:
        """As `Attention.forward`; in between, `[batch, sequence, ffn / ranks]`."""
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh")  # GPT-2's form
        down: Tensor = self.down(x)
        return down


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, tp)
        self.attention = Attention(config, tp)
        self.mlp_norm = make_norm(config, tp)
        self.mlp = MLP(config, tp)
        self.dropout = config.dropout
        self.sequence_group = tp.sequence_group

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[batch, sequence, hidden]` to the same shape; sequence / ranks with sequence parallelism."""
        x = x + self._dropout(self.attention(self.attention_norm(x), table))
        return x + self._dropout(self.mlp(self.mlp_norm(x)))

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training, self.sequence_group)


class Embedding(nn.Module):
    """Token embeddings, plus learned positions where the config asks for them."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.token = VocabParallelEmbedding(config.vocab, config.hidden, tp.group)
        self.position = Position(config, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, sequence]` token ids to `[batch, sequence, hidden]` (see `Position.forward`)."""
        x: Tensor = self.position(self.token(tokens))
        return x


class Position(nn.Module):
    """Adds learned positions, where the config has them; the way into the residual stream."""

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__()
        if config.position == "learned":
            self.weight = nn.Parameter(torch.empty(config.context, config.hidden))
        self.learned = config.position == "learned"
        self.dropout = config.dropout
        self.sequence_group = tp.sequence_group

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden]`, whole on every rank, to the same.

        With sequence parallelism, to this rank's `[batch, sequence / ranks, hidden]`. The weight
        `[context, hidden]` is whole on every rank.
        """
        if self.learned:
            x = x + self.weight[: x.shape[1]]
        return scatter_to_group(dropout(x, self.dropout, self.training), 1, self.sequence_group)


class Output(ColumnParallelLinear):
    """The projection onto the vocabulary.

    Weight: whole `[vocab, hidden]`, on a rank `[ceil(vocab / ranks), hidden]`; hence logits of
    `[batch, sequence, ceil(vocab / ranks)]`.
    """

    def __init__(self, config: GPTConfig, tp: TensorParallel) -> None:
        super().__init__(
            config.hidden, [config.vocab], False, tp.group, tp.sequence_parallel, pad=True
        )


class GPT(nn.Module):
    """The decoder: embedding, blocks, a last norm, and the projection onto the vocabulary.

    With `checkpoint_activations`, a block keeps only its input for the backward pass and computes
    the rest again (arXiv:1604.06174).
    """

    def __init__(
        self,
        config: GPTConfig,
        checkpoint_activations: bool = False,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(config, tp)
        self.blocks = nn.ModuleList(Block(config, tp) for _ in range(config.layers))
        self.norm = make_norm(config, tp)
        self.output = Output(config, tp)
        if config.tied:
            self.output.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[batch, sequence, vocab]`, or with `labels` their mean cross entropy (a scalar).

        `tokens` and `labels` are `[batch, sequence]`; `labels[:, i]` is the token that follows
        `tokens[:, i]`. Both results are the same on every tensor rank.
        """
        x = self.embedding(tokens)
        table = None
        if self.config.position == "rope":
            table = rotary_table(self.config, tokens.shape[1], tokens.device)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, table, use_reentrant=False)
            else:
                x = block(x, table)
        logits: Tensor = self.output(self.norm(x))
        if labels is None:
            return gather_from_group(logits, -1, self.tp.group)[..., : self.config.vocab]
        return vocab_parallel_cross_entropy(logits, labels, self.config.vocab, self.tp.group)
