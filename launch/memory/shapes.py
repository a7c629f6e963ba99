"""The parameters that a rank holds, one by one: names and sizes, without building the model.

DeepSpeed pads every parameter or every group of them, so that their sum is not enough for a count that
is exact to the byte.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from models.config import GPTConfig


class Shape(NamedTuple):
    """One parameter as a rank holds it. Matrices and vectors are separate optimizer groups."""

    name: str
    numel: int
    matrix: bool


def layer_shapes(config: GPTConfig, layer: str, tensor: int) -> list[Shape]:
    """The parameters of a layer of the chain (`models.config.parameters_by_layer`).

    They are in the order of `module.parameters()`, as one of `tensor` ranks holds them: matrices and the
    biases of column-parallel layers sharded, norms, positions and the biases of row-parallel layers
    whole, the vocabulary padded to a multiple of the ranks.
    """
    c = config
    if layer in ("token", "output"):
        return [Shape(layer, -(-c.vocab // tensor) * c.hidden, True)]
    if layer == "position":
        return [Shape(layer, c.context * c.hidden, True)] if c.position == "learned" else []
    if layer == "norm":
        return _norm("norm", c)
    query, key_value = c.heads * c.head_dim // tensor, c.kv_heads * c.head_dim // tensor
    ffn = c.ffn // tensor
    up = ffn * (2 if c.mlp == "swiglu" else 1)
    found = _norm("attention_norm", c)
    found += _linear("qkv", c.hidden, query + 2 * key_value, c.bias)
    found += _linear("out", query, c.hidden, c.bias)
    if c.qk_norm:
        found += [Shape("query_norm", c.head_dim, False), Shape("key_norm", c.head_dim, False)]
    found += _norm("mlp_norm", c)
    return found + _linear("up", c.hidden, up, c.bias) + _linear("down", ffn, c.hidden, c.bias)


def _norm(name: str, config: GPTConfig) -> list[Shape]:
    vectors = 2 if config.norm == "layernorm" else 1
    return [Shape(name, config.hidden, False)] * vectors


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> list[Shape]:
    return [Shape(name, inputs * outputs, True)] + [Shape(name, outputs, False)] * bias


def chain(config: GPTConfig) -> list[str]:
    """The names of the layers that a pipeline splits: token, position, the blocks, norm, output."""
    return ["token", "position", *["block"] * config.layers, "norm", "output"]


@lru_cache(maxsize=1024)
def stage_shapes(config: GPTConfig, tensor: int, first: int, last: int) -> tuple[Shape, ...]:
    """The parameters of layers first to last - 1; an output tied to a token embedding counts once."""
    names = chain(config)[first:last]
    if config.tied and {"token", "output"} <= set(names):
        names.remove("output")
    shapes = {name: layer_shapes(config, name, tensor) for name in set(names)}
    return tuple(shape for name in names for shape in shapes[name])


def count(shapes: Iterable[Shape]) -> int:
    """Number of parameters."""
    return sum(shape.numel for shape in shapes)
