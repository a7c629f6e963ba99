"""Sums by copies between two GPUs: NCCL's bits, whatever runs beside them, and one device's training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.parity.run import TrainingRecord, run_layout
from tests.parity.cases import Case, Workbench
from tests.parity.kinds import COMPILE, INTERLEAVED, PP2, STDLIB, TP2
from tests.parity.planting import plant
from tests.ranks import run_ranks

COPIES = "parallel.copy_engine=true"
GRAPHS = "train.cuda_graphs=true"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]
# In elements: a piece, one less, few, several pieces, and odd numbers.
SIZES = (2**23, 2**23 - 1, 5, 3 * 2**23 + 1, 2**18, 40_000_003)


def start() -> tuple[Any, dist.ProcessGroup, dist.ProcessGroup, torch.Tensor]:
    """This rank, a group that is to sum by copies, one for NCCL's sums, and a matrix to multiply."""
    from launch.runtime.process_group import init_process_group, prepare_environment

    prepare_environment()
    ranks = init_process_group()
    torch.manual_seed(ranks.rank)
    square = torch.randn(4096, 4096, device=ranks.device, dtype=torch.bfloat16)
    return ranks, dist.new_group([0, 1]), dist.new_group([0, 1]), square


def sums_that_differ(wait_left_out: bool) -> list[int]:
    """Elements of which sums by copies and NCCL's differ, of many sums in a row beside matrix products."""
    ranks, group, theirs, square = start()
    from models.parallel import collectives, copy_engine
    from models.parallel.collectives import all_reduce, start_sum, sum_by_copies

    if wait_left_out:
        plant(copy_engine._Sum, "wait", lambda self, timeout=None: True)
    sum_by_copies(group, 2**28)
    plant(collectives, "LEAST_BYTES", 0)
    differ = []
    for turn in range(20):
        for dtype in (torch.bfloat16, torch.float32):
            xs = [torch.randn(n, device=ranks.device).to(dtype) for n in SIZES]
            expected = [all_reduce(x, theirs) for x in xs]
            if ranks.rank == turn % 2:  # the other rank's sums must wait for this one's
                for _ in range(20):
                    square @ square
            works = []
            for x in xs:
                works.append(start_sum(x, group))
                square @ square
            for work in works:
                work.wait()
            differ.append(sum(int((x != y).sum()) for x, y in zip(xs, expected, strict=True)))
    return differ


def test_a_sum_has_nccls_bits() -> None:
    for found in run_ranks(sums_that_differ, 2, False):
        assert found == [0] * 40


def test_a_sum_that_is_not_waited_for_is_seen() -> None:
    assert any(sum(found) > 0 for found in run_ranks(sums_that_differ, 2, True))


def replayed_sums_that_differ(frees: bool) -> list[int]:
    """Elements of which a recorded sum, replayed, and NCCL's differ: one sum, so one slot every time.

    Rank 1 has what it needs long before it adds; without `frees`, rank 0 does not wait for that.
    """
    ranks, group, theirs, square = start()
    from models.parallel.collectives import all_reduce, start_sum, sum_by_copies
    from models.parallel.copy_engine import _FREE, _Slots

    wait, signal = _Slots.wait, _Slots.signal

    def wait_long(self: Any, slot: int, number: int) -> None:
        if number == _FREE and not frees:
            return
        wait(self, slot, number)
        if number != _FREE and ranks.rank == 1:
            for _ in range(20):
                square @ square

    def signal_pieces(self: Any, slot: int, number: int) -> None:
        if number != _FREE or frees:
            signal(self, slot, number)

    plant(_Slots, "wait", wait_long)
    plant(_Slots, "signal", signal_pieces)
    xs = torch.randn(20, 2**22, device=ranks.device)
    expected = [all_reduce(x, theirs) for x in xs]
    sum_by_copies(group, xs[0].nbytes)
    x = xs[0].clone()
    start_sum(x, group).wait()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start_sum(x, group).wait()
    differ = []
    for value, sum_ in zip(xs, expected, strict=True):
        x.copy_(value)
        graph.replay()
        differ.append((x != sum_).sum())
    return [int(each) for each in differ]


def test_a_sum_in_a_cuda_graph_has_nccls_bits() -> None:
    for found in run_ranks(replayed_sums_that_differ, 2, True):
        assert found == [0] * 20


def test_a_slot_that_is_not_free_yet_is_seen() -> None:
    assert any(sum(found) > 0 for found in run_ranks(replayed_sums_that_differ, 2, False))


def _every_sum_by_copies(*arguments: Any) -> TrainingRecord:
    """The small models' tensors too."""
    from models.parallel import collectives

    plant(collectives, "LEAST_BYTES", 0)
    return run_layout(*arguments)


def _without_the_other_ranks_part(*arguments: Any) -> TrainingRecord:
    from models.parallel.copy_engine import _Slots

    right = _Slots.as_tensors

    def wrong(self: Any, x: torch.Tensor, slot: int) -> Any:
        mine, theirs = right(self, x, slot)
        return torch.zeros_like(mine), theirs

    plant(_Slots, "as_tensors", wrong)
    return _every_sum_by_copies(*arguments)


CASES = [
    Case("zero1", 2, "fp32", overrides=(TP2, COPIES)),
    Case("zero1", 2, "bf16", "llama", checkpoint_activations=True, overrides=(TP2, COPIES)),
    Case("zero1", 2, "bf16", overrides=(TP2, COPIES, COMPILE)),
    Case("zero1", 2, "bf16", overrides=(TP2, COPIES, COMPILE, GRAPHS)),
    Case("zero1", 2, "fp32", "llama", overrides=(TP2, COPIES, COMPILE, GRAPHS)),
    Case("zero2", 2, "fp32", "llama", overrides=(TP2, COPIES, COMPILE)),
    Case("zero3", 2, "bf16", overrides=(TP2, COPIES, COMPILE)),
    Case(
        "zero1", 2, "bf16", "llama", checkpoint_activations=True,
        overrides=(TP2, COPIES, COMPILE),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_gpus_equal_one(case: Case, bench: Workbench) -> None:
    case = replace(case, overrides=(STDLIB, *case.overrides))
    assert not [d for d in bench.compare(case, _every_sum_by_copies) if d.past]


def test_a_sum_without_the_other_ranks_part_is_seen(bench: Workbench) -> None:
    assert [d for d in bench.compare(CASES[0], _without_the_other_ranks_part) if d.past]


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="four GPUs")
@pytest.mark.parametrize(
    "overrides",
    [(), (GRAPHS,), (PP2,), (PP2, *INTERLEAVED, "model.layers=4")],
    ids=["data", "data-graphs", "1f1b", "interleaved"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_gpus_equal_one(precision: str, overrides: tuple[str, ...], bench: Workbench) -> None:
    """Two groups of two tensor ranks, each with copies of its own."""
    overrides = (STDLIB, TP2, COPIES, COMPILE, *overrides)
    case = Case("zero1", 4, precision, micro_batch=2, overrides=overrides)
    assert not [d for d in bench.compare(case, _every_sum_by_copies) if d.past]
