"""Labels that count unequally, and rows of several documents, equal one device in every layout.

The loss is the mean over the labels of the global batch: of eight micro batches two have no label that
counts and two have three (`launch/parity/weights.py`).
"""

import dataclasses
from typing import Any

import pytest

from tests.parity.cases import DOCUMENTS, EPS, Case, Workbench
from tests.parity.hf_cases import HFCase
from tests.parity.kinds import KINDS, PP2, TP2, axes_of
from tests.parity.planting import Fault, faulty_layout, first_seen, plant
from tests.selection import representatives

STEMS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu")
LAYOUTS = [
    *(Case(stem, ranks) for stem in STEMS for ranks in (1, 2)),
    Case("zero2", 4, "bf16", "llama", checkpoint_activations=True),
    Case("zero3", 2, "bf16"),
    *KINDS.values(),
    *(dataclasses.replace(KINDS[kind], precision="bf16") for kind in ("pp2_tp2_sequence", "3d")),
    Case("zero1", 4, "fp32", "llama", overrides=("parallel.pipeline=4", "model.layers=5")),
]
CASES = [
    *(
        dataclasses.replace(
            case,
            uneven_weights=True,
            overrides=(*case.overrides, *EPS[case.precision], DOCUMENTS),
        )
        for case in LAYOUTS
    ),
    *(
        dataclasses.replace(
            KINDS[kind], uneven_weights=True, overrides=(*KINDS[kind].overrides, *EPS["fp32"])
        )
        for kind in ("tp2", "pp2_dp2")
    ),
    HFCase("zero1", 2, "fp32", model="llama", uneven_weights=True, overrides=(DOCUMENTS,)),
    HFCase(
        "zero3", 2, "fp32", model="qwen3", tensor=1, uneven_weights=True, overrides=(DOCUMENTS,)
    ),
]


def kinds(case: Case) -> set[object]:
    """ZeRO stage, precision, and the axes that are sharded; each with rows of several documents."""
    return {case.stem, *axes_of(case), DOCUMENTS in case.overrides, type(case)}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "case",
    representatives(CASES, kinds, cost=lambda case: case.ranks),
    ids=lambda case: case.name,
)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}


def mean_of_means() -> None:
    """Each micro batch's loss is divided by its own labels' weight."""
    import torch.distributed as dist

    from launch.training import train_step

    right = train_step.train_step

    def wrong(engine: Any, batch: Any) -> Any:
        micro_batches = len(batch) * dist.get_world_size(engine.data_parallel_group)
        own = batch.loss_weights.sum((1, 2), keepdim=True).clamp(min=1e-6)
        weights = batch.loss_weights * (batch.total_weight / micro_batches) / own
        return right(engine, dataclasses.replace(batch, loss_weights=weights))

    plant(train_step, "train_step", wrong)


def divided_by_the_labels_of_this_rank() -> None:
    from launch.training import train_step

    right = train_step.train_step

    def wrong(engine: Any, batch: Any) -> Any:
        return right(
            engine, dataclasses.replace(batch, total_weight=float(batch.loss_weights.sum()))
        )

    plant(train_step, "train_step", wrong)


def weights_left_out() -> None:
    from launch.data.batch import Batch

    right = Batch.micro_batches

    def wrong(self: Any) -> Any:
        for batch in right(self):
            yield batch._replace(loss_weights=None)

    plant(Batch, "micro_batches", wrong)


def documents_that_see_each_other_on_the_last_stage() -> None:
    from models import attention, pipeline

    right = attention.attention_inputs

    def wrong(config: Any, sequence: int, positions: Any, device: Any) -> Any:
        import torch.distributed as dist

        last = dist.get_rank() >= dist.get_world_size() // 2
        inputs = right(config, sequence, positions, device)
        return inputs._replace(mask=None) if last else inputs

    plant(pipeline, "attention_inputs", wrong)


def learned_positions_that_go_on_across_documents() -> None:
    from models.gpt import Position

    right = Position.forward
    plant(Position, "forward", lambda self, x, positions: right(self, x, None))


LOSS_1 = "loss at step 1"
FAULTS: list[tuple[Fault, Case]] = [
    (mean_of_means, Case("zero1", 1, uneven_weights=True)),
    (mean_of_means, Case("zero3", 2, uneven_weights=True)),
    (mean_of_means, Case("zero1", 2, "bf16", uneven_weights=True, overrides=(TP2,))),
    (mean_of_means, Case("zero1", 2, uneven_weights=True, overrides=(PP2,))),
    (divided_by_the_labels_of_this_rank, Case("zero2", 2, uneven_weights=True)),
    (weights_left_out, Case("zero1", 2, uneven_weights=True, overrides=(PP2,))),
    (
        documents_that_see_each_other_on_the_last_stage,
        Case("zero1", 2, "fp32", "llama", overrides=(PP2, DOCUMENTS)),
    ),
    (
        learned_positions_that_go_on_across_documents,
        Case("zero2", 1, overrides=(DOCUMENTS,)),
    ),
]


@pytest.mark.parametrize(
    ("fault", "case"), FAULTS, ids=[f"{fault.__name__}-{case.name}" for fault, case in FAULTS]
)
def test_fault_is_caught(fault: Fault, case: Case, bench: Workbench) -> None:
    assert first_seen(bench.compare(case, faulty_layout, fault))[:1] == [LOSS_1]
    assert first_seen(bench.sound(case)) == []
