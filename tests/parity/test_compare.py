"""Comparing two traces, and refusing what cannot be compared."""

import math

import pytest
import torch

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.parity.compare import Difference, Tolerances, compare, key_biases, tolerances
from launch.parity.report import verdict
from launch.parity.run import TrainingRecord, check_comparable

LIMITS = Tolerances(first_loss=1e-6, loss=1e-5, grad_norm=1e-5, matrices=1e-5, vectors=1e-5)


def trace(
    losses: tuple[float, ...] = (4.0, 2.0), weights: dict[str, torch.Tensor] | None = None
) -> TrainingRecord:
    return TrainingRecord(list(losses), [1.0] * len(losses), [1e-3] * len(losses), weights or {})


def recipe(model: dict[str, object]) -> Recipe:
    return recipe_from_dict(
        {
            "name": "t",
            "model": model,
            "data": {"sequence_length": 8},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "deepspeed": {"config": "ds_configs/zero1.json"},
        }
    )


def past(differences: list[Difference]) -> list[tuple[str, str]]:
    return [(d.quantity, d.where) for d in differences if d.past]


def test_the_first_loss_is_held_to_its_own_bound() -> None:
    assert past(compare(trace(), trace((4.0 + 2e-5, 2.0 + 1e-5)), LIMITS, {})) == [
        ("loss", "step 1")
    ]


def test_a_loss_that_is_no_number_is_past_every_bound() -> None:
    differences = compare(trace(), trace((4.0, math.nan)), LIMITS, {})
    assert past(differences) == [("loss", "step 2")]
    assert differences[-1].where == "step 2"
    assert "FAILS" in verdict(differences)
    assert "loss at step 2" in verdict(differences)


def test_only_the_key_rows_are_bounded_by_the_learning_rate() -> None:
    expected = torch.ones(6)
    for row, quantity in ((0, "weights"), (2, None), (5, "weights")):
        got = expected.clone()
        got[row] += 3e-3  # the bound is 2 * (1e-3 + 1e-3)
        found = compare(
            trace(weights={"b": expected}), trace(weights={"b": got}), LIMITS, {"b": slice(2, 4)}
        )
        assert past(found) == ([(quantity, "b")] if quantity else [])
    got = expected.clone()
    got[3] += 5e-3
    found = compare(
        trace(weights={"b": expected}), trace(weights={"b": got}), LIMITS, {"b": slice(2, 4)}
    )
    assert past(found) == [("key bias", "b")]


def test_a_tensor_that_stayed_zero_has_to_stay_zero() -> None:
    zero = torch.zeros(3)
    assert not past(compare(trace(weights={"b": zero}), trace(weights={"b": zero}), LIMITS, {}))
    moved = trace(weights={"b": zero + 1e-12})
    assert past(compare(trace(weights={"b": zero}), moved, LIMITS, {})) == [("weights", "b")]


def test_missing_weights_are_no_agreement() -> None:
    with pytest.raises(ValueError, match="weights differ"):
        compare(trace(weights={"b": torch.ones(1)}), trace(), LIMITS, {})


def test_bf16_bounds_grow_with_depth_and_fp32_ones_do_not() -> None:
    deep, flat = tolerances(torch.bfloat16, 24), tolerances(torch.bfloat16, 2)
    assert deep.matrices == pytest.approx(flat.matrices * 1.03**22)
    assert tolerances(torch.float32, 24) == tolerances(torch.float32, 2)


def test_keys_are_free_only_where_their_bias_cannot_matter() -> None:
    gpt2 = {"size": "tiny", "layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2}
    assert key_biases(recipe(gpt2)) == {"blocks.0.attention.qkv.bias": slice(32, 48)}
    assert key_biases(recipe({**gpt2, "qk_norm": True})) == {}
    assert key_biases(recipe({**gpt2, "bias": False})) == {}


@pytest.mark.parametrize(
    ("model", "ds_config", "words"),
    [
        ({}, {"fp16": {"enabled": True}}, "deepspeed.fp16.loss_scale=1024"),
        (
            {},
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "deepspeed.torch_autocast.dtype=bfloat16",
        ),
        ({"dropout": 0.1}, {}, "--set model.dropout=0.0"),
        ({}, {"optimizer": {"type": "Lion"}}, "deepspeed.optimizer.type=AdamW"),
        (
            {},
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "deepspeed.optimizer.params.adam_w_mode=true",
        ),
    ],
)
def test_what_cannot_be_compared_is_rejected_with_the_override_to_use(
    model: dict[str, object], ds_config: dict[str, object], words: str
) -> None:
    usual: dict[str, object] = {"optimizer": {"type": "AdamW"}}
    with pytest.raises(UserError) as caught:
        check_comparable(recipe({"size": "tiny", **model}), usual | ds_config)
    assert words in str(caught.value)
