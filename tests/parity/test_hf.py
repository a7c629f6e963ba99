"""`family: hf` on ranks equals transformers on one device: its own loading, dtypes and loss."""

from typing import Any

import pytest

from tests.parity.cases import Workbench
from tests.parity.hf_cases import WHOLE_MODELS, HFCase
from tests.selection import representatives


def case(stem: str, ranks: int, precision: str, model: str, **more: Any) -> HFCase:
    return HFCase(stem, ranks, precision, model=model, tensor=1, **more)


CASES = [
    case("zero0", 2, "bf16", "llama"),
    case("zero1", 2, "bf16", "llama_tied", checkpoint_activations=True),
    case("zero2", 2, "fp32", "gpt2", checkpoint_activations=True),
    case("zero2", 4, "bf16", "qwen3", micro_batch=2),
    case("zero3", 2, "bf16", "llama"),
    case("zero3", 4, "fp32", "biases", checkpoint_activations=True),
    case("zero1", 2, "fp32", "mixture", micro_batch=2),
    case("zero2", 2, "fp32", "mixture", uneven_weights=True),
    case("zero2", 2, "bf16", "mixture", micro_batch=2, checkpoint_activations=True),
    case("zero1", 2, "bf16", "buffers"),
    case("zero3", 2, "fp32", "buffers"),
]


def kinds(each: HFCase) -> set[object]:
    """Stage, model, precision, checkpointing, and labels that count unequally."""
    return {
        each.stem,
        each.model if each.model in WHOLE_MODELS else "rotary",
        each.precision,
        ("checkpointed", each.checkpoint_activations),
        ("uneven", each.uneven_weights),
    }


@pytest.mark.parametrize("each", representatives(CASES, kinds), ids=lambda each: each.name)
def test_layout_equals_one_device(each: HFCase, bench: Workbench) -> None:
    differences = bench.compare(each)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}
