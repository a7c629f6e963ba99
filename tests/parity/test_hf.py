"""`family: hf` on ranks equals transformers on one device: its own loading, dtypes and loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity.cases import Workbench
from tests.parity.hf_cases import WHOLE_MODELS, HFCase
from tests.parity.planting import Fault, faulty_layout, first_seen, plant
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


def _casts_buffers() -> None:
    from launch.training import build_model

    plant(build_model, "_cast_parameters", lambda model, dtype: model.to(dtype))


def _forgets_the_router_loss() -> None:
    from transformers import MixtralForCausalLM

    forward = MixtralForCausalLM.forward

    def without(self: torch.nn.Module, **inputs: object) -> object:
        return forward(self, **inputs, output_router_logits=False)

    plant(MixtralForCausalLM, "forward", without)


def _one_router_loss_a_micro_batch() -> None:
    """Not times the labels that it is a mean of, as the other losses are summed."""
    from models.hf import HFCausalLM

    init: Callable[..., None] = HFCausalLM.__init__

    def smaller(self: HFCausalLM, model: Any, checkpointed: bool = False) -> None:
        init(self, model, checkpointed)
        model.router_aux_loss_coef /= 32

    plant(HFCausalLM, "__init__", smaller)


FAULTS = [
    (_casts_buffers, case("zero2", 2, "bf16", "llama_tied"), "loss at step 1"),
    (_casts_buffers, case("zero3", 2, "bf16", "llama"), "loss at step 1"),
    (_forgets_the_router_loss, case("zero1", 2, "fp32", "mixture", micro_batch=2), "loss at step 1"),
    (_one_router_loss_a_micro_batch, case("zero1", 2, "fp32", "mixture", micro_batch=2),
     "loss at step 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "each", "seen"), FAULTS)
def test_a_fault_is_seen(fault: Fault, each: HFCase, seen: str, bench: Workbench) -> None:
    assert first_seen(bench.compare(each, faulty_layout, fault))[0] == seen
