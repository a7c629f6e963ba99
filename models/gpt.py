"""One decoder for GPT-2 and for the Llama and Qwen line. Nothing here knows of ranks.

Read from top to bottom: position, attention, MLP, block, model, first weights. Shapes are written
as `[batch, sequence, hidden]`; `heads * head_dim` is called the query width.

Parameter names are the canonical names of checkpoints, weights files and parity tables, in every
layout. Matrices follow torch: `[out, in]`.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import GPTConfig


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


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm, or RMSNorm (arXiv:1910.07467), over the last dimension of size `width`."""
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv:2305.13245).

    `qkv` holds the rows of all query heads, then all key heads, then all value heads.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.widths = [
            n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)
        ]
        self.qkv = nn.Linear(config.hidden, sum(self.widths), bias=config.bias)
        self.out = nn.Linear(self.widths[0], config.hidden, bias=config.bias)
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[batch, sequence, hidden]` to the same shape. `table` is None without RoPE."""
        query, key, value = (
            # [batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,  # without it, each token would be shown the answer it has to predict
            enable_gqa=key.shape[1] != query.shape[1],
        )
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """`down(gelu(up(x)))`, or SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`.

    SwiGLU's `up` holds the rows of gate, then those of up, so that one product does both.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.hidden, config.ffn * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.ffn, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden]` to the same shape, through `[batch, sequence, ffn]`."""
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

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.hidden)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.hidden)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[batch, sequence, hidden]` to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x), table))
        added: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return added


class Embedding(nn.Module):
    """Token embeddings, plus learned positions where the config asks for them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab, config.hidden)
        self.learned = config.position == "learned"
        if self.learned:
            self.position = nn.Embedding(config.context, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, sequence]` token ids to `[batch, sequence, hidden]`."""
        x = self.token(tokens)
        if self.learned:
            x = x + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        dropped: Tensor = self.dropout(x)
        return dropped


class GPT(nn.Module):
    """The decoder: embedding, blocks, a last norm, and the projection onto the vocabulary.

    With `checkpoint_activations`, a block keeps only its input for the backward pass and computes
    the rest again (arXiv:1604.06174).
    """

    def __init__(self, config: GPTConfig, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, config.hidden)
        self.output = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.output.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[batch, sequence, vocab]`, or with `labels` their mean cross entropy (a scalar).

        `tokens` and `labels` are `[batch, sequence]`; `labels[:, i]` is the token that follows
        `tokens[:, i]`.
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
        return logits if labels is None else cross_entropy(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens of -log p(label), in fp32: `[..., vocab]` and `[...]` to a scalar.

    bf16 has 8 bits of precision: a loss computed in it moves in steps of about 0.4%.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


Gather = Callable[[nn.Parameter], AbstractContextManager[object]]


def initialize(model: GPT, seed: int, gather: Gather = lambda _: nullcontext()) -> None:
    """Draw the first weights: normal matrices, with the residual ones scaled down by depth.

    Each parameter has a generator of its own, seeded by `seed` and its name. So every layout starts
    from the same full tensors, whichever of them a rank holds and in whatever order. `gather` makes
    a parameter whole while it is written (ZeRO-3 holds a part of it).

    Source: GPT-2 (section 2.3) scales residual projections by 1 / sqrt(2 * layers).
    """
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.layers)
    for name, parameter in model.named_parameters():
        with gather(parameter), torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(parameter.device)
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            drawn = torch.empty_like(parameter, dtype=torch.float32)
            drawn.normal_(0.0, residual_std if residual else config.init_std, generator=generator)
            parameter.copy_(drawn)
