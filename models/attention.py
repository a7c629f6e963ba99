"""Causal self-attention: rotary positions, document mask, heads sharded over tensor ranks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import GPTConfig
from models.norms import RMSNorm
from models.parallel.collectives import all_gather
from models.parallel.rng import fork_rng_per_rank
from models.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from models.parallel.topology import TensorParallel


def rotary_table(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles, each `[*positions.shape, head_dim]`, in fp32.

    Computed in every forward pass: a buffer would be cast to bf16 with the model, and bf16 cannot
    represent all positions above 256. Source: RoFormer, arXiv:2104.09864, in Llama's half-split
    order.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of a head's elements by the angle of its position.

    `x` is `[batch, heads, sequence, head_dim]`; the result has the same shape and dtype.
    """
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class AttentionInputs(NamedTuple):
    """Inputs shared by the attention of all blocks, computed once per micro batch.

    `rotary` is RoPE's table (cosines and sines, each `[sequence, head_dim]`, or
    `[batch, 1, sequence, head_dim]` if each row has its own positions); None without RoPE.
    `mask` is `[batch, 1, sequence, sequence]`, True where a token may attend; None: plain causal.
    """

    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None


def attention_inputs(
    config: GPTConfig, sequence: int, positions: Tensor | None, device: torch.device
) -> AttentionInputs:
    """The inputs for a micro batch with `sequence` tokens per row.

    `positions` `[batch, sequence]` restart at 0 in each document of a row, and a token attends only
    to earlier tokens of its own document. Without them, each row is one document.
    """
    rotary = None
    if config.position == "rope":
        if positions is None:
            rotary = rotary_table(config, torch.arange(sequence, device=device))
        else:
            cos, sin = rotary_table(config, positions)
            rotary = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for each head
    mask = None if positions is None else document_mask(positions)
    return AttentionInputs(rotary, mask)


def document_mask(positions: Tensor) -> Tensor:
    """Which tokens each token attends to.

    `[batch, sequence]` positions to bool `[batch, 1, sequence, sequence]`.

    A document begins where a position is 0.
    """
    documents = (positions == 0).cumsum(-1)
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.tril().unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv:2305.13245), sharded by heads.

    `qkv` holds the rows of all query heads, then all key heads, then all value heads; a rank's
    shard holds those of its own heads in the same order. If there are fewer key/value heads than
    ranks, the rows of a head are sharded over the ranks that share it, and its keys and values are
    gathered: every rank attends to the whole head, and no weight is stored twice.

    Weights: qkv is `[(heads + 2 kv_heads) * head_dim, hidden]`, and a rank holds rows / ranks; out
    is `[hidden, heads * head_dim]`, and a rank holds columns / ranks.
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

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """`[batch, sequence, hidden]`, the same on every rank, to the same shape.

        With sequence parallelism, `[batch, sequence / ranks, hidden]` to the same shape. In
        between, each rank computes heads / ranks of the heads over the whole sequence.
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
        if inputs.rotary is not None:
            query, key = rotate(query, inputs.rotary), rotate(key, inputs.rotary)
        dropout_p = self.dropout if self.training else 0.0
        with fork_rng_per_rank(self.tp.group if dropout_p else None, x.device):
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=inputs.mask,
                dropout_p=dropout_p,
                # Without a mask or is_causal, each token would see the token it has to predict.
                is_causal=inputs.mask is None,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected
