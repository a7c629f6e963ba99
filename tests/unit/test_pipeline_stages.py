"""Where the chain of layers is split into stages, and that its sizes are those of the real layers."""

import json
from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

import pytest
import torch

from models.config import (
    SIZES,
    GPTConfig,
    count_parameters,
    flops_by_layer,
    flops_per_token,
    parameters_by_layer,
)
from models.gpt import GPT
from models.parallel.topology import ONE_RANK
from models.pipeline import layer_specs
from models.pipeline_stages import balanced_bounds, stage_bounds, uniform_bounds

TINY, LLAMA = SIZES["tiny"], SIZES["tiny_llama"]


def sizes(config: GPTConfig) -> list[int]:
    return [size for _, size in parameters_by_layer(config)]


def largest(config: GPTConfig, bounds: list[int]) -> int:
    return max(sum(sizes(config)[first:last]) for first, last in pairwise(bounds))


def smallest_possible(config: GPTConfig, stages: int) -> int:
    """The largest stage of the best of all ways to cut."""
    chain = len(sizes(config))
    return min(
        largest(config, [0, *cuts, chain]) for cuts in combinations(range(1, chain), stages - 1)
    )


def per_stage(config: GPTConfig, bounds: list[int], name: str) -> list[int]:
    names = [layer for layer, _ in parameters_by_layer(config)]
    return [names[first:last].count(name) for first, last in pairwise(bounds)]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_by_layer_are_those_of_the_built_layers(size: str) -> None:
    config = SIZES[size]
    specs, layers = layer_specs(config, ONE_RANK), parameters_by_layer(config)
    assert len(specs) == len(layers) == config.layers + 4
    assert [name for name, _ in layers] == [
        "token", "position", *["block"] * config.layers, "norm", "output",
    ]  # fmt: skip
    for index in (0, 1, 2, -2, -1):
        with torch.device("meta"):
            built = specs[index].build()
        assert layers[index][1] == sum(p.numel() for p in built.parameters()), layers[index]
    assert len({size for name, size in layers if name == "block"}) == 1
    with torch.device("meta"):
        whole = GPT(config)
    assert count_parameters(config) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("config", [TINY, LLAMA, replace(TINY, layers=5), replace(LLAMA, layers=7)])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_by_parameters_the_largest_stage_is_as_small_as_can_be(
    config: GPTConfig, stages: int
) -> None:
    bounds = stage_bounds(config, stages, "parameters")
    assert len(bounds) == stages + 1 and bounds[0] == 0 and bounds[-1] == config.layers + 4
    assert bounds == sorted(set(bounds))
    assert largest(config, bounds) == smallest_possible(config, stages)


@pytest.mark.parametrize("partition", ["parameters", "flops", "uniform", "type:block"])
def test_bounds_are_plain_integers(partition: str) -> None:
    assert json.loads(json.dumps(stage_bounds(TINY, 2, partition))) == [0, 4, 8]


def test_by_flops_the_output_projection_counts_and_the_embedding_does_not() -> None:
    """On two H100s, 13 blocks and 11 beside the projection take equally long (recipes/SPEED.md)."""
    bounds = stage_bounds(SIZES["1b3"], 2, "flops")
    assert per_stage(SIZES["1b3"], bounds, "block") == [13, 11]
    assert per_stage(SIZES["1b3"], stage_bounds(SIZES["1b3"], 2, "parameters"), "block") == [12, 12]
    config = replace(LLAMA, vocab=1024)
    assert sum(flops_by_layer(config)) == pytest.approx(
        flops_per_token(config, config.context), rel=0.01
    )


@pytest.mark.parametrize("layers", [4, 5, 6, 7])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_uniformly_stages_have_as_many_layers(layers: int, stages: int) -> None:
    bounds = stage_bounds(replace(TINY, layers=layers), stages, "uniform")
    counts = [last - first for first, last in pairwise(bounds)]
    assert sum(counts) == layers + 4 and len(counts) == stages
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("partition", ["type:block", "type:^BLOCK$", "type:bl.*k"])
def test_by_type_stages_have_as_many_of_it(partition: str) -> None:
    for layers, stages in ((4, 2), (4, 4), (6, 3), (5, 2), (7, 3)):
        config = replace(LLAMA, layers=layers)
        bounds = stage_bounds(config, stages, partition)
        counts = per_stage(config, bounds, "block")
        assert sum(counts) == layers and max(counts) == -(-layers // stages), (layers, stages)
        assert min(counts) > 0
        assert bounds[0] == 0 and bounds[-1] == layers + 4


def test_a_large_vocabulary_weighs_as_it_should() -> None:
    """The embeddings of this model are half of it; cut uniformly, the ends carry too much."""
    config = replace(LLAMA, vocab=64 * LLAMA.vocab)
    bounds = stage_bounds(config, 3, "parameters")
    assert per_stage(config, bounds, "block")[1] >= 3
    assert largest(config, bounds) <= largest(config, stage_bounds(config, 3, "uniform"))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ("best", "'best' is not parameters, flops, uniform or type:REGEX"),
        ("type", "'type' is not parameters, flops, uniform or type:REGEX"),
        ("type:(", r"'\(' is no regular expression"),
        (
            "type:mlp",
            "0 layers match 'mlp', fewer than the 2 stages; they are token, position, 4 of block",
        ),
    ],
)
def test_bad_partitions_are_rejected(partition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_bounds(LLAMA, 2, partition)


@pytest.mark.parametrize("partition", ["parameters", "uniform"])
def test_a_stage_without_parameters_is_rejected(partition: str) -> None:
    with pytest.raises(ValueError, match=r"stage \d+ of 9 would have nothing to train"):
        stage_bounds(TINY, 9, partition)  # its chain has 8 layers
    with pytest.raises(ValueError, match="nothing to train"):
        stage_bounds(LLAMA, 8, partition)  # with RoPE, the layer of positions has none


@pytest.mark.parametrize("seed", range(20))
def test_chains_are_cut_where_deepspeed_would_cut_them(seed: int) -> None:
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    random = Random(seed)
    for _ in range(20):
        chain = [
            random.choice([0, 1, 5, random.randrange(1000)]) for _ in range(random.randint(1, 24))
        ]
        stages = random.randint(1, 8)
        assert balanced_bounds(chain, stages) == [int(b) for b in partition_balanced(chain, stages)]
        assert uniform_bounds(len(chain), stages) == list(partition_uniform(len(chain), stages))
