"""Tensor, pipeline and 3D parallelism equal one device without DeepSpeed.

Two lists: every tiny parallel recipe as it is, and the settings that a few layouts alone have. The
matrix of features is the certificate: test_certificate.py.
"""

import re

import pytest
from _pytest.mark import ParameterSet

from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.paths import ROOT
from tests.parity.cases import CLIP, DOCUMENTS, FAMILIES, NO_CLIP, Case, Workbench
from tests.parity.kinds import INTERLEAVED, OFFLOAD, PP2, TP2
from tests.selection import representatives

PARALLEL = re.compile(r"tp\d|pp\d|3d")
RECIPES = sorted(
    file for file in (ROOT / "recipes").glob("gpt_tiny_*.yaml") if PARALLEL.search(file.stem)
)
PRECISIONS = ("fp32", "bf16")


def _recipe_cases() -> list[Case]:
    """Every recipe, on as many ranks as its own command starts, with one layer more than divides."""
    found = []
    for i, file in enumerate(RECIPES):
        command = re.search(r"--num_gpus (\d+)", file.read_text())
        assert command, f"{file.name} does not say on how many ranks it runs"
        parallel = load_recipe(file).parallel
        parts = parallel.pipeline * parallel.model_chunks
        for p, precision in enumerate(PRECISIONS):
            found.append(
                Case(
                    file.stem.removeprefix("gpt_tiny_"),
                    int(command[1]),
                    precision,
                    list(FAMILIES)[(p + i) % 2],
                    clip=CLIP if (i + p) % 2 else NO_CLIP,
                    checkpoint_activations=(i // 2 + p) % 2 == 0,
                    overrides=(f"model.layers={max(2, parts) + 1}",),
                )
            )
    return found


# Gradients are added to their fp32 sums after the backward pass, not as they come.
DEFERRED = "deepspeed.bf16.immediate_grad_update=false"
# The output projection weighs more than a block: stages of 3 blocks and 1.
BY_FLOPS = ("parallel.partition=flops", "model.layers=4", "model.vocab=640")
LOW_SUMS = "deepspeed.data_types.grad_accum_dtype=null"  # gradients added up in bf16
WHOLE_MESSAGES = (
    "deepspeed.pipeline.pipe_partitioned=false", "deepspeed.pipeline.grad_partitioned=false",
)  # fmt: skip
# Chunks of a sequence that they do not divide.
LOSS_CHUNKS, MLP_CHUNKS = "model.loss_chunks=3", "model.mlp_chunks=3"
ON_CPU = "model.cpu_checkpointing=true"
WHOLE_BLOCKS = "deepspeed.zero_optimization.leaf_module={classes: [Block]}"
BF16_COPY = (
    "deepspeed.bf16.enabled=true", "deepspeed.torch_autocast.enabled=false",
    "deepspeed.data_types.grad_accum_dtype=bf16",
)  # fmt: skip
AUTOCAST = (
    "deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast.dtype=bfloat16",
    "deepspeed.bf16.enabled=false",
)  # fmt: skip
SIX_HEADS = (
    "parallel.tensor=3", "model.heads=6", "model.kv_heads=6", "model.hidden=48", "model.ffn=99",
)  # fmt: skip
# One key head on four ranks, each with a quarter of its rows; norms of heads on every rank.
ONE_KEY = ("parallel.tensor=4", "model.kv_heads=1", "model.qk_norm=true", "model.tied=true")
ZERO_BUBBLE = "parallel.schedule=zb-h1"
FIVE_BLOCKS = (*INTERLEAVED, "model.layers=5")  # in the four parts of two stages
SPECIAL = [
    *(
        Case("zero1", ranks, "bf16", family, overrides=(*degrees, LOW_SUMS))
        for ranks, family, degrees in (
            (2, "gpt2", (TP2,)), (2, "gpt2", (PP2,)), (4, "llama", (TP2, PP2)),
        )
    ),
    *(Case("zero2", 4, "bf16", family, overrides=(TP2, LOW_SUMS)) for family in FAMILIES),
    Case("zero1", 2, "bf16", overrides=(PP2, *BY_FLOPS, DEFERRED)),
    Case("zero1", 4, "bf16", "llama", overrides=(TP2, PP2, DEFERRED)),
    *(
        Case("zero1", 4, precision, family, overrides=(TP2, PP2, *WHOLE_MESSAGES))
        for precision, family in zip(PRECISIONS, FAMILIES, strict=True)
    ),
    *(
        Case("zero1", ranks, precision, family, overrides=(*degrees, *OFFLOAD))
        for precision in PRECISIONS
        for ranks, family, degrees in ((4, "gpt2", (PP2,)), (4, "llama", (TP2, PP2)))
    ),
    Case("zero0", 2, "bf16", "gpt2", overrides=(TP2, *BF16_COPY)),
    Case("zero1", 4, "bf16", "llama", overrides=(TP2, PP2, *AUTOCAST)),
    Case("zero3", 2, "bf16", "gpt2", overrides=(TP2, *AUTOCAST)),
    *(
        Case("zero1", 2, "fp32", "gpt2", clip=NO_CLIP, overrides=(d, "deepspeed.gradient_clipping=0"))
        for d in (TP2, PP2)
    ),
    Case("zero3", 4, "fp32", overrides=("deepspeed.zero_optimization.zero_hpz_partition_size=2",)),
    Case("zero3", 2, "fp32", overrides=(WHOLE_BLOCKS,)),
    Case("zero3", 2, "bf16", overrides=(LOSS_CHUNKS,), uneven_weights=True),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, LOSS_CHUNKS)),
    Case("zero2", 2, "fp32", "llama", checkpoint_activations=True, overrides=(LOSS_CHUNKS,)),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, MLP_CHUNKS)),
    Case(
        "zero3", 2, "bf16", "llama", checkpoint_activations=True, overrides=(MLP_CHUNKS, ON_CPU)
    ),
    Case("zero1", 4, "fp32", checkpoint_activations=True, overrides=(TP2, PP2, ON_CPU)),
    Case(
        "zero3_offload_cpu", 1, "bf16", "llama", checkpoint_activations=True,
        overrides=(MLP_CHUNKS, LOSS_CHUNKS, ON_CPU),
    ),
    Case("zero1", 3, "fp32", "llama", overrides=SIX_HEADS),
    Case("zero0", 3, "bf16", "gpt2", overrides=SIX_HEADS),
    Case("zero1", 4, "fp32", "llama", overrides=(*ONE_KEY, "parallel.sequence=true")),
    Case("zero3", 4, "bf16", "llama", overrides=ONE_KEY),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, PP2, *ONE_KEY[1:])),
    Case("zero0", 2, "bf16", "gpt2", overrides=(PP2, ZERO_BUBBLE), uneven_weights=True),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, PP2, "parallel.sequence=true", ZERO_BUBBLE)),
    Case("zero1", 4, "bf16", "gpt2", overrides=(TP2, PP2, "model.vocab=321", ZERO_BUBBLE)),
    Case("zero1", 2, "bf16", "gpt2", overrides=(PP2, *OFFLOAD, ZERO_BUBBLE)),
    Case("zero1", 2, "bf16", "llama", overrides=(PP2, DOCUMENTS, LOW_SUMS, ZERO_BUBBLE)),
    Case("zero0", 2, "fp32", "gpt2", overrides=(PP2, *FIVE_BLOCKS), uneven_weights=True),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, PP2, "parallel.sequence=true", *FIVE_BLOCKS)),
    Case("zero1", 4, "bf16", "gpt2", overrides=(TP2, PP2, "model.vocab=321", *FIVE_BLOCKS)),
    Case("zero1", 2, "bf16", "gpt2", overrides=(PP2, *OFFLOAD, *FIVE_BLOCKS)),
    Case("zero1", 4, "bf16", "llama", overrides=(TP2, PP2, DOCUMENTS, LOW_SUMS, *FIVE_BLOCKS)),
    Case(
        "zero1", 4, "bf16", checkpoint_activations=True,
        overrides=("parallel.pipeline=4", INTERLEAVED[0], "parallel.model_chunks=3", "model.layers=13"),
    ),
]  # fmt: skip


def _kinds_of_a_recipe(case: Case) -> set[object]:
    return {case.stem, case.precision, case.family}


def _kinds_of_a_special(case: Case) -> set[str]:
    """What it sets, whatever the number of ranks."""
    return {override for override in case.overrides if override not in (TP2, PP2)}


def _cases() -> list[ParameterSet]:
    return [
        *representatives(_recipe_cases(), _kinds_of_a_recipe),
        *representatives(SPECIAL, _kinds_of_a_special, cost=lambda case: case.ranks),
    ]


CASES = _cases()


def test_the_tiny_recipes_cover_the_kinds_of_parallelism() -> None:
    recipes: list[Recipe] = [load_recipe(file) for file in RECIPES]
    degrees = {(r.parallel.tensor > 1, r.parallel.pipeline > 1) for r in recipes}
    assert degrees == {(True, False), (False, True), (True, True)}
    assert {r.parallel.schedule for r in recipes} >= {"1f1b", "zb-h1", "gpipe"}
    assert any(r.parallel.sequence for r in recipes)
    assert 8 in {case.ranks for case in _recipe_cases()}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case, changes=case.few_rows)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}
