"""The shape of a decoder, a table of well-known sizes, and parameter and FLOP counts.

This file does not import torch: planning a 175B model needs neither a GPU nor a framework.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

# Plans list each layer. The deepest transformers that were trained have 1,000 (DeepNet, arXiv:2203.00555).
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class GPTConfig:
    """One decoder-only transformer. The defaults are GPT-2's choices.

    Sizes are in elements. If left at 0, `kv_heads`, `head_dim` and `ffn` default to `heads`,
    `hidden / heads` and `4 * hidden`, as in GPT-2.

    Raises:
        ValueError: if the sizes contradict each other; the message names the fields.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    context: int
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qk_norm: bool = False
    tied: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        # In a frozen dataclass, derived fields must be set through object.__setattr__.
        for name, value in (
            ("kv_heads", self.kv_heads or self.heads),
            ("head_dim", self.head_dim or self.hidden // max(self.heads, 1)),
            ("ffn", self.ffn or 4 * self.hidden),
        ):
            object.__setattr__(self, name, value)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers is {self.layers}; it must be at most {MOST_LAYERS:,}")
        if self.hidden % self.heads and self.head_dim * self.heads != self.hidden:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope turns pairs of numbers; head_dim {self.head_dim} is odd")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")


def _gpt(layers: int, hidden: int, heads: int, context: int = 2048) -> GPTConfig:
    # GPT-2's 50257 tokens, padded to a multiple of 128 for tensor cores and tensor parallelism.
    return GPTConfig(layers, hidden, heads, vocab=50304, context=context)


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **other: Any
) -> GPTConfig:
    settings: dict[str, Any] = {
        "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False,
    }  # fmt: skip
    return GPTConfig(layers, hidden, heads, kv_heads=kv_heads, ffn=ffn, **{**settings, **other})


def _llama3(layers: int, hidden: int, heads: int, ffn: int) -> GPTConfig:
    return _llama(layers, hidden, heads, 8, ffn, vocab=128256, context=8192, rope_theta=500_000.0)


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> GPTConfig:
    return _llama(
        layers, hidden, heads, 8, ffn, head_dim=128, vocab=151936, context=32768,
        rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True, tied=tied,
    )  # fmt: skip


_TINY = GPTConfig(layers=4, hidden=128, heads=4, vocab=320, context=256)

SIZES: dict[str, GPTConfig] = {
    # 257 byte tokens, padded to 320. For CPUs and tests.
    "tiny": _TINY,
    "tiny_llama": _llama(4, 128, 4, 2, 352, vocab=320, context=256),
    # GPT-2 and GPT-3 (table 2.1 of arXiv:2005.14165, with widths divisible by the heads).
    "124m": _gpt(12, 768, 12, context=1024),
    "350m": _gpt(24, 1024, 16),
    "760m": _gpt(24, 1536, 16),
    "1b3": _gpt(24, 2048, 16),
    "2b7": _gpt(32, 2560, 32),
    "6b7": _gpt(32, 4096, 32),
    "13b": _gpt(40, 5120, 40),
    "20b": _gpt(44, 6144, 64),
    "175b": _gpt(96, 12288, 96),
    # Llama 3 (arXiv:2407.21783, table 3).
    "llama3_8b": _llama3(32, 4096, 32, 14336),
    "llama3_70b": _llama3(80, 8192, 64, 28672),
    # Qwen3 (arXiv:2505.09388, table 1).
    "qwen3_0b6": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3_8b": _qwen3(36, 4096, 32, 12288, tied=False),
    "qwen3_32b": _qwen3(64, 5120, 64, 25600, tied=False),
}


def with_changes(config: GPTConfig, changes: dict[str, Any]) -> GPTConfig:
    """A copy of `config` with `changes`; derived sizes are recomputed.

    Changing `hidden` or `heads` resets `head_dim` and `ffn` if they had their default values and
    `changes` does not set them, so shrinking a model takes few overrides.
    """
    derived = {
        "kv_heads": config.heads,
        "head_dim": config.hidden // config.heads,
        "ffn": 4 * config.hidden,
    }
    resets = {
        name: 0
        for name, value in derived.items()
        if name not in changes and getattr(config, name) == value
    }
    return replace(config, **{**resets, **changes})


def parameters_by_layer(config: GPTConfig) -> list[tuple[str, int]]:
    """The chain of layers that a pipeline splits into stages, each with its parameter count.

    A tied output is a separate layer here and counts the parameters of the shared embedding.
    """
    c = config
    norm = c.hidden * (2 if c.norm == "layernorm" else 1)
    query, key_value = c.heads * c.head_dim, c.kv_heads * c.head_dim
    first_mlp = c.ffn * (2 if c.mlp == "swiglu" else 1)
    matrices = c.hidden * (query + 2 * key_value) + query * c.hidden  # attention
    matrices += c.hidden * first_mlp + c.ffn * c.hidden  # mlp
    biases = (query + 2 * key_value) + c.hidden + first_mlp + c.hidden if c.bias else 0
    block = matrices + biases + 2 * norm + (2 * c.head_dim if c.qk_norm else 0)
    positions = c.context * c.hidden if c.position == "learned" else 0
    chain = [("token", c.vocab * c.hidden), ("position", positions)]
    chain += [("block", block)] * c.layers
    return [*chain, ("norm", norm), ("output", c.vocab * c.hidden)]


def flops_by_layer(config: GPTConfig) -> list[int]:
    """FLOPs per token of each layer of the same chain, counted as in `flops_per_token`.

    For sequences as long as the context. Embeddings and norms count as none.
    """
    c = config
    attention = 12 * c.heads * c.head_dim * c.context
    costs = {"block": 6, "output": 6}
    return [
        costs.get(name, 0) * size + (attention if name == "block" else 0)
        for name, size in parameters_by_layer(c)
    ]


def count_parameters(config: GPTConfig) -> int:
    """Number of trainable parameters; tied weights count once."""
    twice = config.vocab * config.hidden if config.tied else 0
    return sum(size for _, size in parameters_by_layer(config)) - twice


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """Floating-point operations to train on one token, forward and backward, without recompute.

    6 N + 12 * layers * (heads * head_dim) * sequence. N includes the output projection but not the
    input embedding or positions. Attention counts in full, although a causal mask needs only half
    (the convention of PaLM, arXiv:2204.02311, appendix B).
    """
    c = config
    not_multiplied = c.context * c.hidden if c.position == "learned" else 0
    if not c.tied:
        not_multiplied += c.vocab * c.hidden  # a tied matrix is multiplied once, as the projection
    n = count_parameters(c) - not_multiplied
    return 6.0 * n + 12.0 * c.layers * c.heads * c.head_dim * sequence_length
