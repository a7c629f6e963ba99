"""GPT-2 in plain PyTorch, for the peers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import GPTConfig


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream.

    The rows of `qkv` are each head's query, key and value in turn, so that to split them over ranks gives
    each rank whole heads.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm1 = nn.LayerNorm(config.hidden, config.norm_eps)
        self.qkv = nn.Linear(config.hidden, 3 * width, config.bias)
        self.out = nn.Linear(width, config.hidden, config.bias)
        self.norm2 = nn.LayerNorm(config.hidden, config.norm_eps)
        self.up = nn.Linear(config.hidden, config.ffn, config.bias)
        self.down = nn.Linear(config.ffn, config.hidden, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, hidden]` to the same shape."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.head_dim))
        # [batch, sequence, heads, 3, head_dim] -> three of [batch, heads, sequence, head_dim]
        query, key, value = heads.permute(3, 0, 2, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class PlainGPT(nn.Module):
    """Token and position embeddings, blocks, a norm, and the projection onto the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.token.weight

    def logits(self, tokens: Tensor) -> Tensor:
        """`[batch, sequence]` token ids to `[batch, sequence, vocab]`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar; `labels` `[batch, sequence]` are the tokens after `tokens`."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), labels.flatten())


def our_names(config: GPTConfig) -> dict[str, str]:
    """The parameters' names in models/gpt.py, by their names here; of tied ones, the first."""
    parts = {
        "norm1": "attention_norm", "qkv": "attention.qkv", "out": "attention.out",
        "norm2": "mlp_norm", "up": "mlp.up", "down": "mlp.down",
    }  # fmt: skip
    names = {
        "token.weight": "embedding.token.weight",
        "position.weight": "embedding.position.weight",
    }
    for layer in range(config.layers):
        for here, there in parts.items():
            kinds = ("weight", "bias") if config.bias or here.startswith("norm") else ("weight",)
            for kind in kinds:
                names[f"blocks.{layer}.{here}.{kind}"] = f"blocks.{layer}.{there}.{kind}"
    names |= {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    return names if config.tied else {**names, "head.weight": "output.weight"}


def by_head(weight: Tensor, config: GPTConfig) -> Tensor:
    """Rows of all queries, keys and values, as in models/attention.py, in the order of `Block.qkv`."""
    apart: Tensor = weight.unflatten(0, (3, config.heads, config.head_dim))
    return apart.transpose(0, 1).flatten(0, 2)
