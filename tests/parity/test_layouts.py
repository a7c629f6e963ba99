"""Tensor, pipeline and 3D parallelism equal one device without DeepSpeed.

Three lists: every tiny parallel recipe as it is; a matrix over the ZeRO recipes, in which each two
features meet; and the settings that a few layouts alone have.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.paths import ROOT
from tests.parity.cases import CLIP, FAMILIES, NO_CLIP, Case, Workbench
from tests.parity.kinds import OFFLOAD, PP2, TP2
from tests.parity.pairs import Row, pairs, pairwise
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
        for p, precision in enumerate(PRECISIONS):
            found.append(
                Case(
                    file.stem.removeprefix("gpt_tiny_"),
                    int(command[1]),
                    precision,
                    list(FAMILIES)[(p + i) % 2],
                    clip=CLIP if (i + p) % 2 else NO_CLIP,
                    checkpoint_activations=(i // 2 + p) % 2 == 0,
                    overrides=("model.layers=5",),
                )
            )
    return found


# tensor ranks, stages, data parallel size
DEGREES = ((2, 1, 1), (2, 1, 2), (4, 1, 1), (1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 2, 1))
FEATURES: dict[str, tuple[Any, ...]] = {
    "degrees": DEGREES,
    "stem": (
        "zero0", "zero1", "zero2", "zero3",
        "zero2_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme",
    ),
    "precision": PRECISIONS,
    "family": tuple(FAMILIES),
    "micro_batch": (1, 2),
    "clip": (CLIP, NO_CLIP),
    "checkpoint_activations": (False, True),
    "sequence": (False, True),
    "schedule": ("1f1b", "gpipe", "naive"),
    "partition": ("parameters", "uniform", "type:block"),
    "layers": (2, 5),
    "vocab": (320, 321),
}  # fmt: skip


def _possible(row: Row) -> bool:
    tensor, pipeline, _ = row["degrees"]
    if pipeline == 1 and (row["schedule"] != "1f1b" or row["partition"] != "parameters"):
        return False
    if pipeline > 1 and row["stem"] not in ("zero0", "zero1"):
        return False
    return (tensor > 1 or not row["sequence"]) and row["layers"] >= pipeline


ROWS = pairwise(FEATURES, _possible)


USUAL: dict[str, Any] = {
    "parallel.tensor": 1, "parallel.pipeline": 1, "parallel.sequence": False,
    "parallel.schedule": "1f1b", "parallel.partition": "parameters",
    "model.layers": 2, "model.vocab": 320,
}  # fmt: skip

# With Adam's eps of 1e-8, an element whose gradient is nearly zero moves by up to a hundredth of a full
# step for rounding alone. In one of these models, one element of 4096 took its matrix to 6.8e-6 of the
# norm on two tensor ranks, and to 2.6e-6 on two data parallel ones; the others came to 4.4e-7.
EPS = {"fp32": ("deepspeed.optimizer.params.eps=1e-7",), "bf16": ()}


def _matrix() -> list[Case]:
    found = []
    for row in ROWS:
        tensor, pipeline, data = row["degrees"]
        degrees = {"parallel.tensor": tensor, "parallel.pipeline": pipeline}
        values = degrees | {key: row[key.rpartition(".")[2]] for key in USUAL.keys() - degrees}
        found.append(
            Case(
                row["stem"],
                tensor * pipeline * data,
                row["precision"],
                row["family"],
                row["micro_batch"],
                row["clip"],
                row["checkpoint_activations"],
                (
                    *(f"{key}={values[key]}" for key in USUAL if values[key] != USUAL[key]),
                    *EPS[row["precision"]],
                ),
            )
        )
    return found


LOW_SUMS = "deepspeed.data_types.grad_accum_dtype=null"  # gradients added up in bf16
WHOLE_MESSAGES = (
    "deepspeed.pipeline.pipe_partitioned=false", "deepspeed.pipeline.grad_partitioned=false",
)  # fmt: skip
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
SPECIAL = [
    *(
        Case("zero1", ranks, "bf16", family, overrides=(*degrees, LOW_SUMS))
        for ranks, family, degrees in (
            (2, "gpt2", (TP2,)), (2, "gpt2", (PP2,)), (4, "llama", (TP2, PP2)),
        )
    ),
    *(Case("zero2", 4, "bf16", family, overrides=(TP2, LOW_SUMS)) for family in FAMILIES),
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
    Case("zero1", 3, "fp32", "llama", overrides=SIX_HEADS),
    Case("zero0", 3, "bf16", "gpt2", overrides=SIX_HEADS),
    Case("zero1", 4, "fp32", "llama", overrides=(*ONE_KEY, "parallel.sequence=true")),
    Case("zero3", 4, "bf16", "llama", overrides=ONE_KEY),
    Case("zero1", 4, "fp32", "llama", overrides=(TP2, PP2, *ONE_KEY[1:])),
]  # fmt: skip


def _kinds_of_a_recipe(case: Case) -> set[object]:
    return {case.stem, case.precision, case.family}


def _kinds_of_a_row(case: Case, row: Row) -> Iterator[object]:
    """Each feature's values; tensor ranks and stages with precision, schedule and sequence."""
    yield from row.items()
    tensor, pipeline, _ = row["degrees"]
    axes = (tensor > 1, pipeline > 1)
    yield axes, row["precision"]
    yield axes, row["schedule"]
    yield axes, row["sequence"]


def _kinds_of_a_special(case: Case) -> set[str]:
    """What it sets, whatever the number of ranks."""
    return {override for override in case.overrides if override not in (TP2, PP2)}


def _cases() -> list[ParameterSet]:
    rows = representatives(
        [pytest.param(case, row) for case, row in zip(_matrix(), ROWS, strict=True)],
        _kinds_of_a_row,
        cost=lambda case, row: case.ranks,
    )
    return [
        *representatives(_recipe_cases(), _kinds_of_a_recipe),
        *(each._replace(values=each.values[:1]) for each in rows),
        *representatives(SPECIAL, _kinds_of_a_special, cost=lambda case: case.ranks),
    ]


CASES = _cases()


def test_the_tiny_recipes_cover_the_kinds_of_parallelism() -> None:
    recipes: list[Recipe] = [load_recipe(file) for file in RECIPES]
    degrees = {(r.parallel.tensor > 1, r.parallel.pipeline > 1) for r in recipes}
    assert degrees == {(True, False), (False, True), (True, True)}
    assert {r.parallel.schedule for r in recipes} >= {"1f1b", "gpipe"}
    assert any(r.parallel.sequence for r in recipes)
    assert 8 in {case.ranks for case in _recipe_cases()}


def test_each_two_features_meet() -> None:
    met = {pair for row in ROWS for pair in pairs(row)}
    for stem in FEATURES["stem"]:
        assert (("degrees", (2, 1, 2)), ("stem", stem)) in met
        assert (("stem", stem), ("sequence", True)) in met
    for schedule in FEATURES["schedule"]:
        for degrees in ((1, 2, 2), (1, 4, 1), (2, 2, 1)):
            assert (("degrees", degrees), ("schedule", schedule)) in met
        assert (("sequence", True), ("schedule", schedule)) in met


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}
