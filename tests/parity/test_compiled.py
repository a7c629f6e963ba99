"""torch.compile changes no layout's gradients: each equals one device, not compiled, without DeepSpeed.

ZeRO-3 has no persistent parameters here (`SMALL_PARTS` of launch/certify/compositions.py): every weight
is gathered and released.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.paths import ROOT
from models.parallel.grid import Grid
from models.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from models.parallel.topology import Topology
from tests.parity.cases import FAMILIES, Case, Workbench, hundred_steps
from tests.parity.kinds import COMPILE, INTERLEAVED, PP2, TP2
from tests.ranks import run_ranks
from tests.unit.tp_cases import start

FOUR_PARTS = (*INTERLEAVED, "model.layers=4")
CASES = [
    Case("zero3", 2, checkpoint_activations=True, overrides=(COMPILE,)),
    Case("zero3", 1, "bf16", "llama", overrides=(COMPILE,)),
    Case("zero2", 2, "bf16", overrides=(COMPILE,)),
    Case("zero0", 1, "fp32", "llama", overrides=(COMPILE,)),
    Case("zero0", 1, "fp32", overrides=("model.loss_chunks=3", COMPILE)),
    Case("zero3", 2, "bf16", "llama", overrides=("model.loss_chunks=3", COMPILE)),
    Case("zero1", 1, "fp32", overrides=("model.mlp_chunks=3", COMPILE)),
    Case(
        "zero3", 1, "bf16", "llama", checkpoint_activations=True,
        overrides=(
            "model.mlp_chunks=3", "model.loss_chunks=3", "model.cpu_checkpointing=true", COMPILE,
        ),
    ),
    Case("zero1", 2, "fp32", "llama", checkpoint_activations=True, overrides=(PP2, COMPILE)),
    Case("zero1", 2, "bf16", micro_batch=2, overrides=(PP2, *FOUR_PARTS, COMPILE)),
    # 321 words: the ranks' shards of the vocabulary are padded.
    Case(
        "zero1", 2, "bf16", micro_batch=2,
        overrides=(TP2, "model.vocab=321", "model.layers=1", COMPILE),
    ),
    Case("zero1", 2, "bf16", micro_batch=2, overrides=(TP2, "model.vocab=321", COMPILE)),
    Case("zero2", 2, "fp32", "llama", checkpoint_activations=True, overrides=(TP2, COMPILE)),
    Case("zero3", 4, "fp32", overrides=("parallel.tensor=4", COMPILE)),
    Case("zero1", 4, "bf16", micro_batch=2, overrides=(TP2, PP2, COMPILE)),
    Case("zero1", 4, "fp32", "llama", micro_batch=2, overrides=(TP2, PP2, *FOUR_PARTS, COMPILE)),
]  # fmt: skip


def layers_of_two_ranks(compiled: bool) -> list[torch.Tensor]:
    """A tensor-parallel MLP in bf16: its output, and the gradients of its input and its weights."""
    from launch.training.compile import compile_engine

    start()
    grid = Grid(tensor=2)
    group = Topology(grid, 1).tensor_parallel().group
    model = nn.Sequential(
        ColumnParallelLinear(16, [64], group=group),
        nn.GELU(),
        RowParallelLinear(64, 16, group=group),
    ).bfloat16()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    engine: Any = SimpleNamespace(
        module=model,
        zero_optimization_stage=lambda: 1,
        compile=lambda compile_kwargs: model.compile(**compile_kwargs),
    )
    if compiled:
        compile_engine(engine, grid)
    x = torch.randn(2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [tensor.float() for tensor in (y.detach(), *gradients) if tensor is not None]


def test_compiled_tensor_parallel_layers_equal_uncompiled_ones() -> None:
    """Compiled layers call functional collectives, the others `torch.distributed`."""
    eager, compiled = (run_ranks(layers_of_two_ranks, 2, flag) for flag in (False, True))
    for expected, found in zip(eager, compiled, strict=True):
        assert len(expected) == len(found) == 6
        for one, other in zip(expected, found, strict=True):
            assert one.norm() > 0
            assert (one - other).norm() <= 1e-2 * one.norm()


# Compiling a model takes minutes of CPU time. `make test` has the layers above, and a model with ZeRO-3's
# hooks in the core of the certificate.
@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_equals_one_device_over_a_hundred_steps(
    family: str, ranks: int, bench: Workbench
) -> None:
    assert not [d for d in bench.compare(hundred_steps(family, ranks)) if d.past]


def test_deepspeeds_own_linear_layer_is_off_where_zero3_is_compiled() -> None:
    """Under torch 2.11 its weights get no gradients when it is traced; under 2.13 on a CPU they do."""
    for compiled in (False, True):
        recipe = load_recipe(
            ROOT / "recipes/gpt_tiny_zero3.yaml", [f"train.compile={str(compiled).lower()}"]
        )
        zero = resolve(recipe, plan_layout(recipe, 1))["zero_optimization"]
        assert zero.get("memory_efficient_linear", True) is not compiled
