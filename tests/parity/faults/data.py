"""Faults of the batches, and of the loss as a mean over the labels of a global batch."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, Seeded
from tests.parity.kinds import PP2, TP2
from tests.parity.planting import plant


def ranks_read_the_samples_of_rank_0() -> None:
    from launch.data.batches import Batches

    right = Batches.rank_batch

    def wrong(self: Any, step: int, layout: Any, data_rank: int) -> Any:
        return right(self, step, layout, 0)

    plant(Batches, "rank_batch", wrong)


def each_rank_shuffles_with_its_own_seed() -> None:
    import os

    from launch.data.batches import Batches

    right = Batches.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        self.seed += int(os.environ["RANK"])

    plant(Batches, "__init__", wrong)


def batches_begin_with_the_second() -> None:
    from launch.data.batches import Batches

    right = Batches.indices
    plant(Batches, "indices", lambda self, step: right(self, step + 1))


def last_sample_dropped() -> None:
    """The one before it is taken twice."""
    from launch.data.batches import Batches

    right = Batches.indices

    def wrong(self: Any, step: int) -> Any:
        found = right(self, step).copy()
        found[-1] = found[-2]
        return found

    plant(Batches, "indices", wrong)


def last_label_is_the_first_token() -> None:
    """Labels are the row rolled by one."""
    from launch.data import batches

    right = batches.read_rows

    def wrong(*arguments: Any) -> Any:
        rows = right(*arguments)
        return rows._replace(labels=rows.tokens.roll(-1, 1))

    plant(batches, "read_rows", wrong)


def labels_not_shifted() -> None:
    from launch.data import batches

    right = batches.read_rows

    def wrong(*arguments: Any) -> Any:
        rows = right(*arguments)
        return rows._replace(labels=rows.tokens)

    plant(batches, "read_rows", wrong)


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


def loss_of_one_rank_reported() -> None:
    """It is divided by the ranks all the same."""
    import torch.distributed as dist

    from launch.training import train_step

    plant(
        train_step,
        "dist",
        SimpleNamespace(get_world_size=dist.get_world_size, all_reduce=lambda *a, **k: None),
    )


BATCH = "batch"
ONE = Case("zero1", 1, overrides=(FEW_ROWS,))
TWO = Case("zero0", 2, overrides=(FEW_ROWS,))
# Eight rows: of every four parts of a batch one has no label that counts.
UNEVEN = Case("zero1", 1, uneven_weights=True)
UNEVEN_STAGES = Case("zero1", 2, uneven_weights=True, overrides=(PP2,))
FAULTS = [
    Seeded(
        ranks_read_the_samples_of_rank_0,
        TWO,
        LOSS_1,
        BATCH,
        "tokens",
        ranks=(1,),
        more=((Case("zero3", 2), LOSS_1), (Case("zero3", 2, "bf16"), LOSS_1)),
    ),
    Seeded(each_rank_shuffles_with_its_own_seed, TWO, LOSS_1, BATCH, "tokens", ranks=(1,)),
    Seeded(batches_begin_with_the_second, ONE, LOSS_1, BATCH, "tokens"),
    Seeded(last_sample_dropped, TWO, LOSS_1, BATCH, "tokens", ranks=(1,)),
    Seeded(last_label_is_the_first_token, ONE, LOSS_1, BATCH, "labels"),
    Seeded(labels_not_shifted, ONE, LOSS_1, BATCH, "labels"),
    Seeded(
        mean_of_means,
        UNEVEN,
        LOSS_1,
        BATCH,
        "loss weights",
        more=(
            (Case("zero3", 2, uneven_weights=True), LOSS_1),
            (Case("zero1", 2, "bf16", uneven_weights=True, overrides=(TP2,)), LOSS_1),
            (UNEVEN_STAGES, LOSS_1),
        ),
    ),
    Seeded(
        divided_by_the_labels_of_this_rank,
        Case("zero2", 2, uneven_weights=True),
        LOSS_1,
        "loss",
        "loss",
        "of a micro batch",
        ranks=(0, 1),
    ),
    Seeded(
        weights_left_out, UNEVEN, LOSS_1, BATCH, "loss weights", more=((UNEVEN_STAGES, LOSS_1),)
    ),
    Seeded(loss_of_one_rank_reported, TWO, LOSS_1, "loss", "loss", "of the step", ranks=(0, 1)),
]
