"""What several ranks hold alike stays alike to the bit, whatever the layout and however many steps.

Norms, positions and the biases of row-parallel layers are whole on every tensor rank, a tied
embedding is on the first stage and on the last, and data parallel ranks hold the same of everything.
Each copy is stepped by a rank of its own: nothing but equal gradients keeps them equal.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config.layout import plan_layout
from tests.parity.cases import STEPS, Case, Workbench
from tests.parity.faults.pipeline import tied_gradients_not_summed
from tests.parity.faults.sequence import norms_of_other_tokens_not_summed
from tests.parity.kinds import KINDS, axes_of
from tests.parity.planting import Fault
from tests.ranks import run_ranks
from tests.selection import representatives

# Of each parameter that a rank holds: whether it is a shard, and digests of weight and fp32 master.
Held = dict[str, tuple[bool, bytes, bytes]]


def _no_fault() -> None:
    pass


def _hold_after_steps(fault: Fault, values: dict[str, Any], scratch: Path) -> Held:
    """Run in each rank."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param
    from torch import Tensor

    from launch.checkpoint.full_weights import canonical_names
    from launch.training.setup import local_engine
    from launch.training.train_step import train_step

    def digest(tensor: Tensor) -> bytes:
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.blake2b(raw).digest()

    fault()
    found: Held = {}
    with local_engine(values, scratch) as local:
        for step in range(STEPS):
            train_step(local.engine, local.batch(step))
        for name, parameter in canonical_names(local.engine.module).items():
            master = safe_get_full_fp32_param(parameter)
            # ZeRO-3 has cut it over the data parallel ranks; any other parameter is left alone.
            with deepspeed.zero.GatheredParameters(
                [parameter], enabled=hasattr(parameter, "ds_id")
            ):
                weight = digest(parameter)
                found[name] = (
                    hasattr(parameter, "shard"),
                    weight,
                    weight if master is None else digest(master),
                )
    return found


def _apart(case: Case, bench: Workbench, fault: Callable[[], None]) -> tuple[set[str], set[str]]:
    """The parameters that several ranks hold alike, and those of them that have come apart."""
    recipe = case.recipe(bench.folder, case.few_rows)
    layout = plan_layout(recipe, case.ranks)
    grid = layout.grid
    all_held = run_ranks(
        _hold_after_steps, case.ranks, fault, recipe.model_dump(), bench.folder / "swap"
    )
    copies: dict[tuple[str, int], list[tuple[bytes, bytes]]] = {}
    for rank, held in enumerate(all_held):
        tensor = grid.coordinates(rank)["tensor"]
        for name, (shard, *digests) in held.items():
            copies.setdefault((name, tensor if shard else 0), []).append((digests[0], digests[1]))
    several = {name for (name, _), found in copies.items() if len(found) > 1}
    apart = {name for (name, _), found in copies.items() if len(set(found)) > 1}
    return several, apart


BF16 = ["tp2_sequence", "tp2_dp2_zero3", "pp2_dp2", "3d"]


CASES = [
    *(pytest.param(kind, "fp32") for kind in KINDS), *(pytest.param(kind, "bf16") for kind in BF16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "precision"),
    representatives(
        CASES,
        lambda kind, precision: {*axes_of(KINDS[kind]), precision} - {KINDS[kind].stem},
        cost=lambda kind, precision: KINDS[kind].ranks,
    ),
)
def test_copies_are_equal_to_the_bit(kind: str, precision: str, bench: Workbench) -> None:
    case = dataclasses.replace(KINDS[kind], precision=precision)
    several, apart = _apart(case, bench, _no_fault)
    assert apart == set()
    recipe = case.recipe(bench.folder, case.few_rows)
    if recipe.parallel.tensor > 1:
        assert {"norm.weight", "blocks.0.attention_norm.weight"} <= several
        if case.family == "gpt2":
            assert {"embedding.position.weight", "blocks.1.mlp.down.bias"} <= several
        else:
            assert "blocks.0.attention.query_norm.weight" in several
    if recipe.parallel.pipeline > 1:
        assert ("embedding.token.weight" in several) == (case.family == "gpt2")


def test_norms_that_see_other_tokens_come_apart_where_their_gradients_are_not_summed(
    bench: Workbench,
) -> None:
    _, apart = _apart(KINDS["tp2_sequence"], bench, norms_of_other_tokens_not_summed)
    assert {"norm.weight", "norm.bias", "blocks.0.mlp_norm.weight"} <= apart


def test_tied_copies_come_apart_where_their_gradients_are_not_summed(bench: Workbench) -> None:
    _, apart = _apart(KINDS["pp2_dp2"], bench, tied_gradients_not_summed)
    assert apart == {"embedding.token.weight"}
