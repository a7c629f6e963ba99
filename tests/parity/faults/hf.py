"""Faults of `family: hf`: how a transformers model is loaded, counted and sharded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.parity.faults.seeded import LOSS_1, NORM_1, Seeded
from tests.parity.hf_cases import HFCase
from tests.parity.planting import plant


def buffers_cast_with_the_weights() -> None:
    from launch.training import build_model

    plant(build_model, "_cast_parameters", lambda model, dtype: model.to(dtype))


def router_loss_forgotten() -> None:
    from transformers import MixtralForCausalLM

    forward = MixtralForCausalLM.forward

    def without(self: torch.nn.Module, **inputs: object) -> object:
        return forward(self, **inputs, output_router_logits=False)

    plant(MixtralForCausalLM, "forward", without)


def one_router_loss_a_micro_batch() -> None:
    """Not times the labels that it is a mean of, as the other losses are summed."""
    from models.hf import HFCausalLM

    init: Callable[..., None] = HFCausalLM.__init__

    def smaller(self: HFCausalLM, model: Any, checkpointed: bool = False) -> None:
        init(self, model, checkpointed)
        model.router_aux_loss_coef /= 32

    plant(HFCausalLM, "__init__", smaller)


def labels_shifted_by_transformers_too() -> None:
    """`labels` in the place of `shift_labels`."""
    from models import hf

    right = vars(hf)["cross_entropy"]

    def wrong(logits: Tensor, labels: Tensor, weights: Any = None) -> Any:
        return right(logits[:, :-1], labels[:, 1:], weights)

    plant(hf, "cross_entropy", wrong)


def weights_drawn_in_bf16() -> None:
    """The model is made in the dtype that it is trained in, and every rounded weight is lost."""
    from transformers import AutoModelForCausalLM

    right = AutoModelForCausalLM.from_config

    def wrong(config: Any, dtype: str) -> Any:
        return right(config, dtype="bfloat16").float()

    plant(AutoModelForCausalLM, "from_config", wrong)


def row_parallel_sum_of_autotp_left_out() -> None:
    from deepspeed.module_inject.layers import RowParallel

    plant(RowParallel, "forward", staticmethod(lambda ctx, group, rows, inference: rows))


def column_parallel_input_of_autotp_not_summed_on_the_way_back() -> None:
    from deepspeed.module_inject.layers import ColumnParallel

    plant(ColumnParallel, "backward", staticmethod(lambda ctx, gradient: (None, gradient, None)))


def case(stem: str, ranks: int, precision: str, model: str, tensor: int = 1, **more: Any) -> HFCase:
    return HFCase(stem, ranks, precision, model=model, tensor=tensor, **more)


MIXTURE = case("zero1", 2, "fp32", "mixture", micro_batch=2)
LLAMA = case("zero1", 1, "fp32", "llama")
SHARDED = case("zero1", 2, "fp32", "llama", tensor=2)
BOTH = (0, 1)
FAULTS = [
    Seeded(
        buffers_cast_with_the_weights, case("zero2", 1, "bf16", "llama_tied"), LOSS_1,
        "weights before", r"model\.rotary_emb\.inv_freq",
        more=(
            (case("zero2", 2, "bf16", "llama_tied"), LOSS_1),
            (case("zero3", 2, "bf16", "llama"), LOSS_1),
        ),
    ),
    Seeded(
        router_loss_forgotten, MIXTURE, LOSS_1, "loss", "loss", "of a micro batch", ranks=BOTH
    ),
    Seeded(
        one_router_loss_a_micro_batch, MIXTURE, LOSS_1, "loss", "loss", "of a micro batch",
        ranks=BOTH,
    ),
    Seeded(
        labels_shifted_by_transformers_too, LLAMA, LOSS_1, "loss", "loss", "of a micro batch"
    ),
    Seeded(
        weights_drawn_in_bf16, LLAMA, LOSS_1, "weights before", r"model\.embed_tokens\.weight"
    ),
    Seeded(
        row_parallel_sum_of_autotp_left_out, SHARDED, LOSS_1, "forward",
        r"model\.layers\.0\.self_attn\.o_proj", "its output", ranks=BOTH,
    ),
    Seeded(
        column_parallel_input_of_autotp_not_summed_on_the_way_back, SHARDED, NORM_1, "backward",
        "lm_head", "gradient of its input", ranks=BOTH,
    ),
]  # fmt: skip
