"""models/config.py: sizes, the parameter count and the FLOPs that follow, and rejections."""

from typing import Any

import pytest
import torch

from models.config import SIZES, GPTConfig, count_parameters, flops_per_token, with_changes
from models.gpt import GPT

# In billions, as published (GPT-2, GPT-3, Llama 3, Qwen3).
PUBLISHED = {
    "124m": 0.124, "350m": 0.356, "760m": 0.760, "1b3": 1.316, "2b7": 2.65, "6b7": 6.66,
    "13b": 12.85, "175b": 174.6, "llama3_8b": 8.03, "llama3_70b": 70.55, "qwen3_0b6": 0.596,
    "qwen3_8b": 8.19, "qwen3_32b": 32.76,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_count_equals_the_model(size: str) -> None:
    with torch.device("meta"):
        model = GPT(SIZES[size])
    assert count_parameters(SIZES[size]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("size", "billions"), PUBLISHED.items())
def test_sizes_are_the_published_ones(size: str, billions: float) -> None:
    assert count_parameters(SIZES[size]) / 1e9 == pytest.approx(billions, rel=0.01)


def test_count_by_hand() -> None:
    config = GPTConfig(layers=2, hidden=8, heads=2, vocab=10, context=4)
    # A block: two norms of 16; qkv 8*24+24; out 8*8+8; mlp 8*32+32 and 32*8+8.
    block = 2 * 16 + 216 + 72 + 288 + 264
    assert count_parameters(config) == 2 * block + 10 * 8 + 4 * 8 + 16


def test_flops_by_hand() -> None:
    config = GPTConfig(layers=2, hidden=8, heads=2, vocab=10, context=4)
    # Positions are looked up, not multiplied; the tied matrix is multiplied once, as the output.
    n = count_parameters(config) - 4 * 8
    assert flops_per_token(config, 4) == 6 * n + 12 * 2 * 8 * 4
    untied = with_changes(config, {"tied": False})
    assert count_parameters(untied) == count_parameters(config) + 10 * 8
    assert flops_per_token(untied, 4) == flops_per_token(config, 4)
    # Heads wider than hidden / heads: attention's products have the width of the queries.
    wide = SIZES["qwen3_0b6"]
    twice = flops_per_token(wide, 2048) - flops_per_token(wide, 1024)
    assert twice == 12 * 28 * 16 * 128 * 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "hidden 8 is not a multiple of heads 3"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"vocab": -5}, "vocab is -5; it must be at least 1"),
        ({"layers": 10**9}, "layers is 1000000000; it must be at most 10,000"),
        ({"position": "rope", "head_dim": 3}, "rope turns pairs of numbers; head_dim 3 is odd"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_contradictions_are_rejected(changes: dict[str, Any], message: str) -> None:
    sizes = {"layers": 2, "hidden": 8, "heads": 2, "vocab": 10, "context": 4}
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**sizes, **changes})


def test_a_change_of_width_derives_the_rest_anew() -> None:
    small = with_changes(SIZES["6b7"], {"hidden": 64, "heads": 4})
    assert (small.head_dim, small.ffn, small.kv_heads) == (16, 256, 4)
    # What a size states itself stays.
    llama = with_changes(SIZES["llama3_8b"], {"hidden": 64})
    assert (llama.ffn, llama.kv_heads, llama.vocab) == (14336, 8, 128256)
    assert with_changes(SIZES["qwen3_0b6"], {"hidden": 64}).head_dim == 128
    assert with_changes(SIZES["124m"], {"ffn": 10}).ffn == 10
