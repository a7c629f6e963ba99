"""The estimate of memory against what is really built, kept and measured."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Recipe
from launch.memory.activations import Precision, block_bytes, waiting_bytes
from launch.memory.estimate import StageMemory, estimate
from launch.memory.shapes import count, stage_shapes
from launch.paths import ROOT
from launch.planner.dry_run import print_dry_run
from models.attention import attention_inputs
from models.config import SIZES, GPTConfig, count_parameters
from models.gpt import Block
from models.parallel.grid import Grid
from models.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from models.parallel.topology import Topology
from models.parallel.weight_gradients import WeightGradients
from models.pipeline import layer_specs
from models.pipeline_schedules import SCHEDULES
from models.pipeline_stages import micro_batches_alive, stage_bounds
from tests.ranks import run_ranks
from tests.recipes.headers import header_ranks

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CUT = [file for file in RECIPES if re.search(r"_(tp|pp)\d|_3d", file.stem)]
TINY = SIZES["tiny"]
LLAMA = SIZES["tiny_llama"]


def estimate_of(recipe: Recipe, ranks: int) -> StageMemory:
    layout = plan_layout(recipe, ranks)
    return estimate(recipe, layout, resolve(recipe, layout))


def built_stages(file: Path) -> list[tuple[int, int]]:
    """Each stage's parameters as held by one of its ranks, and those of them before they were cut.

    Built on the meta device as that rank of the recipe's whole grid, the others pretended.
    """
    recipe = load_recipe(file)
    assert isinstance(recipe.model, GPTModel)
    config, parallel = recipe.model.shape, recipe.parallel
    world_size = header_ranks(file)
    grid = plan_layout(recipe, world_size).grid
    bounds = [0, config.layers + 4]
    if parallel.pipeline > 1:
        bounds = stage_bounds(config, parallel.pipeline, parallel.partition)
    found = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        rank = grid.rank(pipeline=stage, data=grid["data"] - 1, tensor=stage % parallel.tensor)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        topology = Topology(grid, max(1, parallel.tensor // config.kv_heads))
        tp = topology.tensor_parallel(parallel.sequence)
        with torch.device("meta"):
            layers = [spec.build() for spec in layer_specs(config, tp)[first:last]]
        if config.tied and parallel.pipeline == 1:
            layers.pop()  # the embedding again
        parameters = [p for layer in layers for p in layer.parameters()]
        whole = [
            p.shard.whole_shape(p.shape) if hasattr(p, "shard") else p.shape for p in parameters
        ]
        found.append(
            (sum(p.numel() for p in parameters), sum(torch.Size(s).numel() for s in whole))
        )
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize("file", CUT, ids=lambda file: file.stem)
def test_parameters_of_each_stage_are_those_of_the_built_shards(file: Path) -> None:
    recipe = load_recipe(file)
    assert isinstance(recipe.model, GPTModel)
    config, parallel = recipe.model.shape, recipe.parallel
    bounds = [0, config.layers + 4]
    if parallel.pipeline > 1:
        bounds = stage_bounds(config, parallel.pipeline, parallel.partition)
    (built,) = run_ranks(built_stages, 1, file)
    expected = [count(stage_shapes(config, parallel.tensor, *ends)) for ends in pairwise(bounds)]
    assert [held for held, _ in built] == expected
    memory = estimate_of(recipe, header_ranks(file))
    assert memory.parameters == expected[memory.stage]
    copies = config.vocab * config.hidden if config.tied and parallel.pipeline > 1 else 0
    assert sum(whole for _, whole in built) == count_parameters(config) + copies


def test_parameters_with_a_padded_vocabulary_and_norms_of_queries() -> None:
    config = replace(LLAMA, vocab=321, qk_norm=True, tied=True)
    whole = count(stage_shapes(config, 1, 0, config.layers + 4))
    assert whole == count_parameters(config)
    halves = count(stage_shapes(config, 2, 0, config.layers + 4))
    norms = config.layers * 2 * (config.hidden + config.head_dim) + config.hidden
    assert 2 * halves == whole + config.hidden + norms  # one row of padding


# On a CPU torch composes RMSNorm of operations that keep fp32 copies, and attention with dropout keeps
# its scores: neither is so on a GPU, and neither is in here.
FAMILIES = {
    "gpt": TINY,
    "llama": replace(LLAMA, norm="layernorm"),
    "one key/value head": replace(LLAMA, norm="layernorm", kv_heads=1),
}
BATCH, SEQUENCE = 2, 64


def kept_bytes(config: GPTConfig, sequence_parallel: bool, dtype: torch.dtype) -> float:
    """Bytes a token that a real block keeps for its backward pass: storages, each counted once."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    topology = Topology(Grid(tensor=size), max(1, size // config.kv_heads))
    tp = topology.tensor_parallel(sequence_parallel)
    block = Block(config, tp).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    inputs = attention_inputs(config, SEQUENCE, None, torch.device("cpu"))
    own |= {part.untyped_storage().data_ptr() for part in inputs.rotary or ()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # The tensor too: a storage that is freed would leave its address to another.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = SEQUENCE // size if sequence_parallel else SEQUENCE
    x = torch.randn(BATCH, tokens, config.hidden, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x, inputs)
    total = sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own
    )
    out.sum().backward()
    return total / (BATCH * SEQUENCE)


def waiting_bytes_of(config: GPTConfig, sequence_parallel: bool) -> float:
    """Bytes a token with which a real block waits for its weight gradients."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    tp = Topology(Grid(tensor=size), max(1, size // config.kv_heads)).tensor_parallel(
        sequence_parallel
    )
    block, later = Block(config, tp), WeightGradients()
    for module in block.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.product = later.linear
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = SEQUENCE // size if sequence_parallel else SEQUENCE
    x = torch.randn(BATCH, tokens, config.hidden, requires_grad=True)
    block(x, attention_inputs(config, SEQUENCE, None, x.device)).square().sum().backward()
    storages = [tensor.untyped_storage() for tensor in later.tensors()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) / (BATCH * SEQUENCE)


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_waits_with_the_bytes_of_the_formula(
    family: str, ranks: int, sequence_parallel: bool
) -> None:
    config = FAMILIES[family]
    expected = waiting_bytes(config, ranks, Precision(4, 4))
    found = run_ranks(waiting_bytes_of, ranks, config, sequence_parallel)
    assert found == [expected] * ranks
    if family == "gpt" and ranks == 1:
        assert expected == 2 * 32 * config.hidden == block_bytes(config, 1, False, Precision(4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_the_bytes_of_the_formula(
    family: str, ranks: int, sequence_parallel: bool, dtype: torch.dtype
) -> None:
    config = FAMILIES[family]
    element = Precision(dtype.itemsize, dtype.itemsize)
    expected = block_bytes(config, ranks, sequence_parallel, element)
    for found in run_ranks(kept_bytes, ranks, config, sequence_parallel, dtype):
        # Norms' statistics, attention's log-sums, dropout's offsets: a few numbers per token.
        assert found == pytest.approx(expected, rel=0.05)


def test_the_formula_is_that_of_the_paper() -> None:
    """arXiv:2205.05198, equations 1 and 2, without attention's scores and dropout's masks."""
    config, h, bf16 = SIZES["6b7"], SIZES["6b7"].hidden, Precision(2, 2)
    assert block_bytes(config, 1, False, bf16) == h * 32
    assert block_bytes(replace(config, dropout=0.1), 1, False, bf16) == h * 34
    assert block_bytes(config, 4, False, bf16) == h * (8 + 24 / 4)
    assert block_bytes(config, 4, True, bf16) == h * (4 + 28 / 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 2), (4, 9), (2, 4)])
def test_micro_batches_alive_are_those_of_the_schedule(
    schedule: str, stages: int, micro_batches: int
) -> None:
    for stage in range(stages):
        alive = most = 0
        for instructions in SCHEDULES[schedule](micro_batches, stages, stage).steps():
            for instruction in instructions:
                alive += {"ForwardPass": 1, "BackwardPass": -1}.get(instruction.name, 0)
                most = max(most, alive)
        assert micro_batches_alive(schedule, stages, stage, micro_batches) == most


def test_offload_moves_the_optimizer() -> None:
    folder, bf16 = ROOT / "recipes", ["deepspeed.bf16.enabled=true"]
    on_device = estimate_of(load_recipe(folder / "gpt_tiny_zero2.yaml", bf16), 2)
    moved = estimate_of(load_recipe(folder / "gpt_tiny_zero2_offload_cpu.yaml", bf16), 2)
    assert not on_device.host and moved.parts.optimizer == 0
    assert moved.host["optimizer"] == pytest.approx(on_device.parts.optimizer, abs=8)
    assert moved.parts.weights == on_device.parts.weights and "; offloaded " in moved.describe()
    all_parts = [*bf16, "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
    everything = estimate_of(load_recipe(folder / "gpt_tiny_zero3_offload_cpu.yaml", all_parts), 2)
    assert everything.host["weights"] > 0 and everything.parts.weights == 0


def test_it_agrees_with_the_measured_peak() -> None:
    """GPT-2 124M on an H200, compiled and not: rows of recipes/BENCHMARKS.md."""
    page = (ROOT / "recipes" / "BENCHMARKS.md").read_text()
    for compiled in ("no", "yes"):
        row = re.search(rf"^\| 1 \| {compiled} \|.*\| ([\d.]+) \|$", page, re.M)
        assert row
        # Measured before gradients were added as they come.
        deferred = "deepspeed.bf16.immediate_grad_update=false"
        overrides = ["train.global_batch_size=64", f"train.compile={compiled == 'yes'}", deferred]
        recipe = load_recipe(ROOT / "recipes" / "gpt_124m_zero1.yaml", overrides)
        assert estimate_of(recipe, 1).total == pytest.approx(float(row[1]), rel=0.02)


def test_the_dry_run_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(ROOT / "recipes" / "gpt_175b_pp16_tp8_zero1.yaml")
    print_dry_run(recipe, 1024)
    memory = estimate_of(recipe, 1024)
    assert memory.describe() in capsys.readouterr().out.splitlines()
    sums = memory.describe().partition("; fullest")[0] + " "
    parts = re.findall(r" ([\d.]+)(?= |$)", sums)
    assert float(parts[0]) == pytest.approx(sum(float(part) for part in parts[1:]), rel=0.01)


def test_gradients_are_sent_in_the_pieces_that_it_counts() -> None:
    from launch.deepspeed_patches.speed import bf16_optimizer
    from launch.memory import moments

    assert moments.PIECE == bf16_optimizer.PIECE
