"""Every tiny ZeRO recipe, on 1, 2 and 4 ranks, equals one device without DeepSpeed."""

import itertools
from collections.abc import Iterator

import pytest

from launch.paths import ROOT
from tests.parity.cases import CLIP, FAMILIES, NO_CLIP, Case, Workbench
from tests.selection import representatives

STEMS = sorted(
    file.stem.removeprefix("gpt_tiny_") for file in (ROOT / "recipes").glob("gpt_tiny_zero*.yaml")
)
RANKS, PRECISIONS = (1, 2, 4), ("fp32", "bf16")


def cases() -> list[Case]:
    """All layouts; micro batch, clipping and checkpointing change from one to the next."""
    found = []
    for (s, stem), (r, ranks), (p, precision), (f, family) in itertools.product(
        enumerate(STEMS), enumerate(RANKS), enumerate(PRECISIONS), enumerate(FAMILIES)
    ):
        found.append(
            Case(
                stem,
                ranks,
                precision,
                family,
                micro_batch=1 + (f + r + s) % 2,
                clip=CLIP if (p + r + s) % 2 else NO_CLIP,
                checkpoint_activations=(s + f) % 2 == 0,
            )
        )
    return found


def kinds(case: Case) -> Iterator[object]:
    """Each recipe on several ranks; every other setting once."""
    if case.ranks > 1:
        yield case.stem
    yield "precision", case.precision
    yield "family", case.family
    yield "ranks", case.ranks
    yield "micro batch", case.micro_batch
    yield "clip", case.clip
    yield "checkpointing", case.checkpoint_activations


CASES = representatives(cases(), kinds, cost=lambda case: case.ranks)


def test_the_tiny_recipes_cover_the_stages_and_offload() -> None:
    assert {
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload_cpu",
        "zero3_offload_cpu",
        "zero3_offload_nvme",
    } <= set(STEMS)


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}
