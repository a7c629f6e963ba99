"""Which parts of a model are compiled: all of it, or each block and the loss, and never none.

And that compiled tensor ranks do not recompute ahead.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from launch.config.load import load_recipe
from launch.paths import ROOT
from launch.training import compile as compiling
from models.config import SIZES
from models.gpt import GPT
from models.parallel.grid import Grid
from tests.ranks import run_ranks

BLOCKS_AND_LOSS = SIZES["tiny"].layers + 1


def compiled(
    model: nn.Module, stage: int, data: int, cuda_graphs: bool = False, tensor: int = 1
) -> tuple[mock.Mock, Any]:
    """`torch.compile`, and the engine's own, as they were called."""
    engine: Any = SimpleNamespace(
        module=model, zero_optimization_stage=lambda: stage, compile=mock.Mock()
    )
    with mock.patch.object(torch, "compile", side_effect=lambda forward, **_: forward) as parts:
        compiling.compile_engine(engine, Grid(data=data, tensor=tensor), cuda_graphs)
    return parts, engine.compile


@pytest.mark.parametrize(
    ("stage", "data", "ours", "whole"),
    [
        (1, 2, True, True),
        (2, 1, True, True),
        (2, 2, True, False),
        (3, 1, True, False),
        (2, 2, False, True),  # a model of family hf
    ],
)
def test_what_is_compiled(stage: int, data: int, ours: bool, whole: bool) -> None:
    with torch.device("meta"):
        model = GPT(SIZES["tiny"]) if ours else nn.Sequential(nn.Linear(2, 2))
    parts, engine = compiled(model, stage, data)
    assert engine.call_count == whole
    assert parts.call_count == (0 if whole else BLOCKS_AND_LOSS)


def test_checkpoints_on_the_cpu_are_moved_outside_compiled_code() -> None:
    with torch.device("meta"):
        model = GPT(SIZES["tiny"], checkpoint_activations=True, cpu_checkpointing=True)
    parts, engine = compiled(model, 1, 1)
    assert (parts.call_count, engine.call_count) == (BLOCKS_AND_LOSS, 0)


@pytest.mark.parametrize("graphs", [False, True])
def test_graphs_are_the_compilers(graphs: bool) -> None:
    with torch.device("meta"):
        model = GPT(SIZES["tiny"])
    _, engine = compiled(model, 1, 1, graphs)
    options = engine.call_args.kwargs["compile_kwargs"]["options"] or {}
    assert options.get("triton.cudagraphs", False) is graphs
    assert options.get("graph_partition", True) is not graphs


@pytest.mark.parametrize("recomputed", [False, True])
def test_waits_of_recomputed_tensor_ranks_move_where_memory_allows(recomputed: bool) -> None:
    with torch.device("meta"):
        model = GPT(SIZES["tiny"], checkpoint_activations=recomputed)
    _, engine = compiled(model, 1, 1, tensor=2)
    passes = engine.call_args.kwargs["compile_kwargs"]["options"][
        "reorder_for_compute_comm_overlap_passes"
    ]
    assert ("sink_waits_iterative" in passes) is recomputed
    assert ("sink_waits" in passes) is not recomputed


LAYERS = 2


def order_of_attention(values: dict[str, Any], scratch: Path) -> str:
    """Each pass of a step's attention, as it came: "f" forward or recomputed, "b" backward."""
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    with local_engine(values, scratch) as local:
        train_step(local.engine, local.batch(0))  # which compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_step(local.engine, local.batch(1))
    calls = sorted(profile.events(), key=lambda event: event.time_range.start)
    names = [e.name for e in calls if e.name.startswith("aten::_scaled_dot_product_flash_")]
    return "".join("b" if name.endswith("_backward") else "f" for name in names)


@pytest.mark.matrix
def test_compiled_tensor_ranks_recompute_a_block_when_it_is_needed(tmp_path: Path) -> None:
    recipe = load_recipe(
        ROOT / "recipes" / "gpt_tiny_tp2_zero1.yaml",
        [
            *("model.checkpoint_activations=true", f"model.layers={LAYERS}", "train.steps=2"),
            *("train.compile=true", "train.global_batch_size=2", "train.micro_batch_size=2"),
            *("data.source=python-stdlib", "data.tokenizer=bytes", "data.sequence_length=64"),
        ],
    )
    for order in run_ranks(order_of_attention, 2, recipe.model_dump(), tmp_path):
        assert order == "f" * LAYERS + "fb" * LAYERS
